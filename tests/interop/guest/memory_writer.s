# A guest without an operating system: a 64 KiB firmware image that never stops changing its memory.
#
# The machine is QEMU's q35 with 64 MiB. What the guest leaves where is said in guest_program.py,
# which also gives this file the addresses (as --defsym):
#
#   PASSES             a 32-bit count of the passes over the memory
#   DIRECTORY          the directory of fw_cfg, as read
#   ROM_COPY           a copy of the 128 KiB of the option ROM area (the block pc.rom)
#   FILES              every file of fw_cfg, each at the next 4 KiB boundary
#   ONCE, ONCE_END     every word is set before the first pass, then left alone
#   SPARSE, SPARSE_END each pass changes every third page
#   EVERY, EVERY_END   each pass changes every page
#   TOGGLE, TOGGLE_END odd passes write something to every page, even ones make it zero again
#   WAVE, WAVE_END     hundreds of pages a second are written to, and as many become zero again,
#                      each for about a second
#
# A KVM that runs inside a virtual machine may emulate all code that is not in long mode, at about a
# million instructions a second. So a pass changes few words of a page, and what is filled
# is filled by string instructions.

    .intel_syntax noprefix
    .set LEGACY_AREA, 0xa0000           # VGA window, option ROMs, firmware alias: up to 1 MiB
    .set LEGACY_AREA_END, 0x100000
    .set OPTION_ROMS, 0xc0000
    .set OPTION_ROMS_LENGTH, 0x20000
    .set STACK, 0x8000
    .set PAGE, 0x1000
    .set STEP, 0x9e3779b1               # from one word that is written to the next
    .set PERIOD, 2047                   # words; no two of the first 2047 pages are alike

    .set WAVE_LENGTH, WAVE_END - WAVE   # a power of two
    .set WAVE_CLOCK, 22                 # the wave moves a page in 2^22 ticks of the time stamp

    .set PCI_ADDRESS, 0xcf8
    .set PCI_DATA, 0xcfc
    .set HOST_BRIDGE_PAM, 0x80000090    # registers 0x90 to 0x96 of device 0:0.0
    .set HOST_BRIDGE_SMRAM, 0x8000009c  # register 0x9d is the second byte here

    .set FW_CFG_SELECTOR, 0x510
    .set FW_CFG_DATA, 0x511
    .set FW_CFG_DIRECTORY, 0x19
    .set ENTRY_LENGTH, 64               # u32 size, u16 key, both big-endian, u16 0, 56 bytes of name

    .text
    .globl _start

    .code16
real_mode:
    cli
    # The code segment begins where this image does, at 0xffff0000.
    lgdtd cs:[gdt_pointer - real_mode]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    ljmpd 0x08, offset protected_mode

    .code32
protected_mode:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, STACK
    cld

    mov esi, OPTION_ROMS
    mov edi, ROM_COPY
    mov ecx, OPTION_ROMS_LENGTH / 4
    rep movsd

    # Map RAM over the whole legacy area, for reading and writing: then there is no byte of pc.ram
    # that has no guest-physical address.
    mov eax, HOST_BRIDGE_PAM
    mov ebx, 0x33333330
    call write_pci
    mov eax, HOST_BRIDGE_PAM + 4
    mov ebx, 0x00333333
    call write_pci
    mov dx, PCI_ADDRESS
    mov eax, HOST_BRIDGE_SMRAM
    out dx, eax
    mov dx, PCI_DATA + 1
    mov al, 0x4a                        # D_OPEN and G_SMRAME
    out dx, al

    mov edi, DIRECTORY
    mov dx, FW_CFG_SELECTOR
    mov ax, FW_CFG_DIRECTORY
    out dx, ax
    mov dx, FW_CFG_DATA
    mov ecx, 4
    rep insb
    mov ebx, [DIRECTORY]
    bswap ebx
    imul ecx, ebx, ENTRY_LENGTH
    rep insb

    mov esi, DIRECTORY + 4
    mov edi, FILES
copy_file:
    movzx eax, word ptr [esi + 4]
    xchg al, ah
    mov dx, FW_CFG_SELECTOR
    out dx, ax
    mov dx, FW_CFG_DATA
    mov ecx, [esi]
    bswap ecx
    rep insb
    add edi, PAGE - 1
    and edi, -PAGE
    add esi, ENTRY_LENGTH
    dec ebx
    jnz copy_file

    # Fill by one string instruction each, from words that differ: every page gets other contents.
    mov eax, STEP
    mov edi, ONCE
    mov ecx, PERIOD
first_words:
    stosd
    add eax, STEP
    loop first_words
    mov esi, ONCE
    mov ecx, (ONCE_END - ONCE) / 4 - PERIOD
    rep movsd
    mov esi, ONCE + 4
    mov edi, LEGACY_AREA
    mov ecx, (LEGACY_AREA_END - LEGACY_AREA) / 4
    rep movsd

    mov ebx, eax
    mov edi, WAVE
set_wave:
    add ebx, STEP
    mov [edi], ebx
    add edi, PAGE
    cmp edi, WAVE_END
    jb set_wave
    rdtsc
    shrd eax, edx, WAVE_CLOCK
    mov ebp, eax
    mov eax, ebx

next_pass:
    inc dword ptr [PASSES]

    mov edi, SPARSE
change_every_third:
    add eax, STEP
    mov [edi + PAGE / 2], eax
    add edi, 3 * PAGE
    cmp edi, SPARSE_END
    jb change_every_third

    mov edi, EVERY
change_every:
    add eax, STEP
    mov [edi], eax
    mov [edi + PAGE - 4], eax
    add edi, PAGE
    cmp edi, EVERY_END
    jb change_every

    # All ones in odd passes, zeros in even ones: a mask.
    mov ebx, [PASSES]
    and ebx, 1
    neg ebx
    mov edi, TOGGLE
change_to_and_from_zero:
    add eax, STEP
    mov edx, eax
    and edx, ebx
    mov [edi + PAGE / 4], edx
    add edi, PAGE
    cmp edi, TOGGLE_END
    jb change_to_and_from_zero

    # ebp is how far the wave has come.
    mov ebx, eax
    rdtsc
    shrd eax, edx, WAVE_CLOCK
    mov edi, eax
    mov eax, ebx
move_wave:
    cmp ebp, edi
    je next_pass
    inc ebp
    mov edx, ebp
    shl edx, 12
    and edx, WAVE_LENGTH - 1
    add eax, STEP
    mov [edx + WAVE], eax
    xor edx, WAVE_LENGTH / 2
    mov dword ptr [edx + WAVE], 0
    jmp move_wave

# Write ebx to the PCI configuration register eax.
write_pci:
    mov dx, PCI_ADDRESS
    out dx, eax
    mov dx, PCI_DATA
    mov eax, ebx
    out dx, eax
    ret

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            # code: base 0, 4 GiB, 32 bits
    .quad 0x00cf93000000ffff            # data: the same
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .org 0xfff0                         # where the processor starts
    .code16
_start:
    jmp real_mode
    .org 0x10000

# void hold_registers(void): set all registers of x86-64, wait for `stop` with two instructions that
# change nothing but rcx, and store all registers in `held`. `holding` tells that it has begun.
# Vectors come from `vectors_in`; zmm and mask registers are only used if `with_avx512` is not 0.

        .globl  hold_registers
        .text
hold_registers:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15

        fninit
        fldpi
        fldl2e
        lea     vectors_in(%rip), %rdi
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovdqu \n*64(%rdi), %ymm\n
        .endr
        cmpq    $0, with_avx512(%rip)
        je      1f
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovdqu64 \n*64(%rdi), %zmm\n
        .endr
        .irp    n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vmovdqu64 \n*64(%rdi), %zmm\n
        .endr
        .irp    n, 1, 2, 3, 4, 5, 6, 7
        kmovw   \n*2(%rdi), %k\n
        .endr
1:
        # The red zone: 128 bytes below the stack pointer.
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
        movq    $0x5a5a00 + \n, -8 * \n(%rsp)
        .endr
        movq    $1, holding(%rip)
        # Flags that few instructions leave: overflow, carry and direction.
        mov     $0x7f, %cl
        add     $1, %cl
        stc
        std
        mov     $0x1111111111111111, %rax
        mov     $0x2222222222222222, %rbx
        mov     $0x3333333333333333, %rdx
        mov     $0x4444444444444444, %rsi
        mov     $0x5555555555555555, %rdi
        mov     $0x6666666666666666, %rbp
        mov     $0x7777777777777777, %r8
        mov     $0x8888888888888888, %r9
        mov     $0x9999999999999999, %r10
        mov     $0xaaaaaaaaaaaaaaaa, %r11
        mov     $0xbbbbbbbbbbbbbbbb, %r12
        mov     $0xcccccccccccccccc, %r13
        mov     $0xdddddddddddddddd, %r14
        mov     $0xeeeeeeeeeeeeeeee, %r15
2:
        mov     stop(%rip), %rcx
        jrcxz   2b

        lea     held(%rip), %rcx
        mov     %rax, 0(%rcx)
        mov     %rbx, 8(%rcx)
        mov     %rdx, 16(%rcx)
        mov     %rsi, 24(%rcx)
        mov     %rdi, 32(%rcx)
        mov     %rbp, 40(%rcx)
        mov     %r8, 48(%rcx)
        mov     %r9, 56(%rcx)
        mov     %r10, 64(%rcx)
        mov     %r11, 72(%rcx)
        mov     %r12, 80(%rcx)
        mov     %r13, 88(%rcx)
        mov     %r14, 96(%rcx)
        mov     %r15, 104(%rcx)
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
        mov     -8 * \n(%rsp), %rax
        mov     %rax, 104 + 8 * \n(%rcx)
        .endr
        pushfq
        cld
        pop     %rax
        mov     %rax, 240(%rcx)
        fstpt   248(%rcx)
        fstpt   264(%rcx)
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovdqu %ymm\n, 320 + \n*64(%rcx)
        .endr
        cmpq    $0, with_avx512(%rip)
        je      3f
        .irp    n, 1, 2, 3, 4, 5, 6, 7
        kmovw   %k\n, 280 + \n*2(%rcx)
        .endr
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovdqu64 %zmm\n, 320 + \n*64(%rcx)
        .endr
        .irp    n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vmovdqu64 %zmm\n, 320 + \n*64(%rcx)
        .endr
3:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

# uint64_t hold_critical_section(struct rseq *): wait for `stop` in a critical section of rseq(2), in
# which the thread begins anew whenever it is interrupted. Return what the kernel believes at the
# end: 0 if the thread is in it but would not be made to begin anew.

        .globl  hold_critical_section
hold_critical_section:
4:      lea     critical_section(%rip), %rax
        mov     %rax, 8(%rdi)
        movq    $1, holding(%rip)
5:      mov     stop(%rip), %rcx
        jrcxz   5b
        mov     8(%rdi), %rax
6:      ret
        .long   0x53053053              # the signature that glibc has registered
7:      jmp     4b

        .data
        .balign 32
critical_section:                       # struct rseq_cs: version, flags, start, length, abort
        .long   0, 0
        .quad   5b, 6b - 5b, 7b

        .section .note.GNU-stack, "", @progbits

"""The service: configuration, listeners, registry, control API, systemd, logging."""

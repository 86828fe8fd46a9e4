"""A small KVM machine as a guest: its monitor is C (machine.h), its program assembler (program.S); Python only steers."""

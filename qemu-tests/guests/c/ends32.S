# Code that ends.c jumps to.
.text
.globl storm_handler, storm_misaligned
storm_misaligned:
    push %eax
storm_handler:
    iret

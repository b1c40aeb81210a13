# 32-bit protected mode, paging off, up to long mode. AT&T syntax.
.section .text.entry, "ax"
.code32
.global multiboot_entry
multiboot_entry:
    cli
    cld
    movl $mb_stack_top, %esp
    movl %eax, multiboot_magic
    movl %ebx, multiboot_info
    lgdt mb_gdt_pointer
    ljmp $0x08, $1f
1:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $mb_text_off, %esi
    call mb_print

    # Five tables of 4 KiB and two more for the alias.
    movl ${tables}, %edi
    movl $(8 * 1024), %ecx
    xorl %eax, %eax
    rep stosl

    # Two-level: eight large pages of 4 MiB, and the alias through a table.
    movl $0x83, %eax
    movl ${tables}, %edi
    movl $8, %ecx
2:  movl %eax, (%edi)
    addl $(4 << 20), %eax
    addl $4, %edi
    loop 2b
    movl $({tables} + 0x1000 + 3), {tables} + (({alias} >> 22) * 4)
    movl $({page} + 3), {tables} + 0x1000
    movl %cr4, %eax
    orl $0x10, %eax
    movl %eax, %cr4
    movl ${tables}, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80010000, %eax
    movl %eax, %cr0
    movl $0x2222, %eax
    call mb_alias
    movl $mb_text_two, %esi
    call mb_print
    call mb_paging_off

    # PAE: PDPT, one directory of sixteen 2 MiB pages, the alias through a table.
    movl $({tables} + 0x3000 + 1), {tables} + 0x2000
    movl $0, {tables} + 0x2004
    movl $0x83, %eax
    movl $({tables} + 0x3000), %edi
    movl $16, %ecx
3:  movl %eax, (%edi)
    addl $(2 << 20), %eax
    addl $8, %edi
    loop 3b
    movl $({tables} + 0x4000 + 3), {tables} + 0x3000 + (({alias} >> 21) * 8)
    movl $({page} + 3), {tables} + 0x4000
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $({tables} + 0x2000), %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80010000, %eax
    movl %eax, %cr0
    movl $0x3333, %eax
    call mb_alias
    movl $mb_text_pae, %esi
    call mb_print
    call mb_paging_off

    # Long mode: a top table over a PDPT of its own (PAE reserves W in its entries) over the same directory.
    movl $({tables} + 0x6000 + 3), {tables} + 0x5000
    movl $({tables} + 0x3000 + 3), {tables} + 0x6000
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $({tables} + 0x5000), %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80010000, %eax
    movl %eax, %cr0
    # Compatibility mode until the far jump.
    movl $0x4444, %eax
    call mb_alias
    movl $mb_text_compat, %esi
    call mb_print
    ljmp $0x18, $4f
.code64
4:  jmp _start

.code32
mb_paging_off:
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    xorl %eax, %eax
    movl %eax, %cr3
    ret

# Writes eax through the alias, reads it at the page itself; exits with code 3 where they differ.
mb_alias:
    movl %eax, {alias}
    cmpl %eax, {page}
    je 5f
    movl $mb_text_bad, %esi
    call mb_print
    movw $0xf4, %dx
    movb $3, %al
    outb %al, %dx
    hlt
5:  ret

# Prints the zero-terminated text at esi on COM1.
mb_print:
6:  lodsb
    testb %al, %al
    je 8f
    movb %al, %bl
    movw $0x3fd, %dx
7:  inb %dx, %al
    testb $0x20, %al
    je 7b
    movw $0x3f8, %dx
    movb %bl, %al
    outb %al, %dx
    jmp 6b
8:  ret

.code64
.section .rodata
mb_text_off: .asciz "stage 0: 32-bit, paging off\n"
mb_text_two: .asciz "stage 1: two-level paging\n"
mb_text_pae: .asciz "stage 2: PAE\n"
mb_text_compat: .asciz "stage 3: compatibility mode\n"
mb_text_bad: .asciz "the alias differs: BAD\n"

.data
.balign 8
mb_gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
mb_gdt_pointer: .word 31
    .long mb_gdt
.balign 4
.global multiboot_magic
multiboot_magic: .long 0
.global multiboot_info
multiboot_info: .long 0
.bss
.balign 16
    .space 4096
mb_stack_top:
.text

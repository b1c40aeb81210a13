# Multiboot: 32-bit protected mode, paging off, straight up to long mode, with the first 64 MiB mapped to themselves.
# AT&T syntax.
.section .text.entry, "ax"
.code32
.global multiboot_entry
multiboot_entry:
    cli
    cld
    movl %ebx, multiboot_info
    # The top table, a PDPT, and a directory of 32 pages of 2 MiB.
    movl $(long_tables + 0x1000 + 3), long_tables
    movl $(long_tables + 0x2000 + 3), long_tables + 0x1000
    movl $0x83, %eax
    movl $(long_tables + 0x2000), %edi
    movl $32, %ecx
1:  movl %eax, (%edi)
    addl $(2 << 20), %eax
    addl $8, %edi
    loop 1b
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $long_tables, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    lgdt long_gdt_pointer
    ljmp $0x08, $2f
.code64
2:  jmp _start

.data
.balign 8
long_gdt: .quad 0, 0x00af9b000000ffff
long_gdt_pointer: .word 15
    .long long_gdt
.balign 4
.global multiboot_info
multiboot_info: .long 0
.bss
.balign 4096
long_tables: .space 3 * 4096
.text

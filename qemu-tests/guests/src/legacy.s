# 32-bit protected mode for a guest that lives in long mode: out of it with paging off, through a script of single
# instructions, and back. AT&T syntax. ESI points to the present step from beginning to end, in handlers too.
.text
.code64
# legacy_run(rdi: first step)
legacy_run:
    push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
    mov %rsp, legacy_rsp
    mov %cr3, %rax
    mov %rax, legacy_cr3
    mov %cr0, %rax
    mov %rax, legacy_cr0
    mov %cr4, %rax
    mov %rax, legacy_cr4
    mov $0xc0000080, %ecx
    rdmsr
    mov %eax, legacy_efer
    mov %edi, %esi
    lgdt legacy_gdtr
    lidt legacy_idtr
    pushq $0x08
    pushq $1f
    lretq
.code32
1:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    movl $legacy_stack_top, %esp
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl $0xc0000080, %ecx
    rdmsr
    andl $0xfffffeff, %eax
    wrmsr
    xorl %eax, %eax
    movl %eax, %cr4
    jmp legacy_step

# A task's first instruction, wherever it comes from.
.global legacy_task
legacy_task:
legacy_step:
    movl (%esi), %eax
    jmp *legacy_table(,%eax,4)
legacy_result:
    movl %eax, 16(%esi)
legacy_next:
    addl $32, %esi
    jmp legacy_step

# Each handler takes its operands at 4, 8 and 12(%esi), and leaves what it finds in EAX.
s_read:
    movl 4(%esi), %edx
    movl (%edx), %eax
    jmp legacy_result
s_write:
    movl 4(%esi), %edx
    movl 8(%esi), %eax
    movl %eax, (%edx)
    jmp legacy_next
s_write_cr0:
    movl 4(%esi), %eax
    movl %eax, %cr0
    jmp legacy_next
s_write_cr3:
    movl 4(%esi), %eax
    movl %eax, %cr3
    jmp legacy_next
s_write_cr4:
    movl 4(%esi), %eax
    movl %eax, %cr4
    jmp legacy_next
s_read_cr0:
    movl %cr0, %eax
    jmp legacy_result
s_read_cr3:
    movl %cr3, %eax
    jmp legacy_result
s_read_cr4:
    movl %cr4, %eax
    jmp legacy_result
s_write_msr:
    movl 4(%esi), %ecx
    movl 8(%esi), %eax
    movl 12(%esi), %edx
    wrmsr
    jmp legacy_next
s_read_msr:
    movl 4(%esi), %ecx
    rdmsr
    movl %edx, 20(%esi)
    jmp legacy_result
s_invlpg:
    movl 4(%esi), %edx
    invlpg (%edx)
    jmp legacy_next
s_invpcid:
    movl 4(%esi), %eax
    movl 8(%esi), %edx
    invpcid (%edx), %eax
    jmp legacy_next
s_task_register:
    str %eax
    jmp legacy_result
s_flags:
    pushfl
    popl %eax
    jmp legacy_result
s_set_flags:
    pushl 4(%esi)
    popfl
    jmp legacy_next
s_jump:
    movl 4(%esi), %eax
    movw %ax, legacy_selector
    ljmpl *legacy_far
    jmp legacy_next
s_call:
    movl 4(%esi), %eax
    movw %ax, legacy_selector
    lcalll *legacy_far
    jmp legacy_next
s_return:
    iretl
    jmp legacy_next
s_interrupt:
    int $0x40
    jmp legacy_next
s_breakpoint:
    int3
    jmp legacy_next
s_pop:
    popl %eax
    jmp legacy_result
s_stack_pointer:
    movl %esp, %eax
    jmp legacy_result
s_read_fs:
    movl 4(%esi), %edx
    movl %fs:(%edx), %eax
    jmp legacy_result
s_load_task_register:
    movl 4(%esi), %eax
    ltr %ax
    jmp legacy_next
s_read_dr6:
    movl %dr6, %eax
    jmp legacy_result
s_read_dr7:
    movl %dr7, %eax
    jmp legacy_result
s_write_dr7:
    movl 4(%esi), %eax
    movl %eax, %dr7
    jmp legacy_next
s_write_dr6:
    movl 4(%esi), %eax
    movl %eax, %dr6
    jmp legacy_next
s_read_cr2:
    movl %cr2, %eax
    jmp legacy_result
s_registers:
    # EBX, EBP and EDI, which no step changes, summed up.
    movl %ebx, %eax
    addl %ebp, %eax
    addl %edi, %eax
    jmp legacy_result
s_set_registers:
    movl 4(%esi), %ebx
    movl 8(%esi), %ebp
    movl 12(%esi), %edi
    jmp legacy_next
s_clear_task_switched:
    clts
    jmp legacy_next

# Back to long mode, whatever mode this is.
s_exit:
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl legacy_cr4, %eax
    movl %eax, %cr4
    movl legacy_cr3, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    xorl %edx, %edx
    movl legacy_efer, %eax
    wrmsr
    movl legacy_cr0, %eax
    movl %eax, %cr0
    ljmp $0x18, $2f
.code64
2:  mov legacy_rsp, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
    ret

.code32
# Exceptions: noted in the step, which then counts as done. One stub of 16 bytes for each of the first 32 vectors.
.balign 16
.global legacy_stubs
legacy_stubs:
.set vector, 0
.rept 32
.balign 16
.if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
.else
    pushl $0
.endif
    pushl $vector
    jmp legacy_trap
.set vector, vector + 1
.endr
legacy_trap:
    # A task whose DS could not be loaded begins here.
    movl $0x10, %eax
    movl %eax, %ds
    popl 24(%esi)
    popl 28(%esi)
    movl (%esp), %eax
    movl %eax, 16(%esi)
    movl $legacy_next, (%esp)
    iretl

.data
.balign 8
legacy_rsp: .quad 0
legacy_cr0: .quad 0
legacy_cr3: .quad 0
legacy_cr4: .quad 0
legacy_efer: .quad 0
legacy_far: .long 0
legacy_selector: .word 0
.balign 4
legacy_table:
    .long s_exit, s_read, s_write, s_write_cr0, s_write_cr3, s_write_cr4, s_read_cr0, s_read_cr3
    .long s_read_cr4, s_write_msr, s_read_msr, s_invlpg, s_invpcid, s_task_register, s_flags, s_set_flags
    .long s_jump, s_call, s_return, s_interrupt, s_breakpoint, s_pop, s_stack_pointer, s_read_fs
    .long s_load_task_register, s_read_dr6, s_read_dr7, s_write_dr7, s_write_dr6, s_read_cr2
    .long s_registers, s_set_registers, s_clear_task_switched
.balign 8
.global legacy_gdtr
legacy_gdtr: .word 32 * 8 - 1
    .quad legacy_gdt
.balign 8
.global legacy_idtr
legacy_idtr: .word 128 * 8 - 1
    .quad legacy_idt
.balign 8
# Null, 32-bit code, data, 64-bit code; the rest is the guest's.
.global legacy_gdt
legacy_gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
    .fill 28, 8, 0
.global legacy_idt
legacy_idt: .fill 128, 8, 0
.bss
.balign 16
    .space 4096
.global legacy_stack_top
legacy_stack_top:
.text
.code64

# Multiboot 1: entered in 32-bit protected mode, paging off.
.section .multiboot, "a"
.balign 4
    .long 0x1badb002
    # Memory information, and with it the command line.
    .long 2
    .long -0x1badb002 - 2

.section .text.entry, "ax"
.globl _start
_start:
    cli
    cld
    movl $stack_top, %esp
    movl %ebx, multiboot_info
    xorl %ebp, %ebp
    call cmain
    ud2

.text
# u32 run_access(op, cpl3, ac, address, value).
.globl run_access
run_access:
    push %ebx
    push %ebp
    push %esi
    push %edi
    pushf
    mov %esp, resume_stack
    movl $1, armed
    mov 24(%esp), %edi
    mov 28(%esp), %esi
    mov 32(%esp), %edx
    mov 36(%esp), %ecx
    mov 40(%esp), %eax
    shl $4, %edi
    test %edx, %edx
    je 1f
    pushf
    orl $0x40000, (%esp)
    popf
1:  test %esi, %esi
    jne 2f
    add $ring0_ops, %edi
    jmp *%edi
2:  pushl $0x1b
    pushl $0
    pushf
    pushl $0x23
    add user_page, %edi
    push %edi
    iret

.balign 16
ring0_ops:
    mov (%ecx), %eax
    jmp resume
.balign 16
    mov %eax, (%ecx)
    jmp resume
.balign 16
    call *%ecx
    jmp resume
.balign 16
    lar %eax, %eax
    jmp resume
.balign 16
    mov %eax, %gs
    jmp resume

.balign 16
.globl user_ops, user_ops_end
user_ops:
    mov (%ecx), %eax
    int $0x80
.balign 16
    mov %eax, (%ecx)
    int $0x80
.balign 16
    jmp *%ecx
.balign 16
    lar %eax, %eax
    int $0x80
.balign 16
    mov %eax, %gs
    int $0x80
user_ops_end:

# The frame of what ended the access is left where it is.
.globl done_stub
done_stub:
resume:
    mov resume_stack, %esp
    movl $0, armed
    popf
    pop %edi
    pop %esi
    pop %ebp
    pop %ebx
    ret

.globl page_fault_stub
page_fault_stub:
    incl faults
    mov (%esp), %eax
    mov %eax, fault_error
    mov %cr2, %eax
    mov %eax, fault_address
    cmpl $0, armed
    jne resume
    pushl $14
    jmp exception

.balign 16
.globl exception_stubs
exception_stubs:
.set vector, 0
.rept 32
.balign 16
    pushl $vector
    jmp exception
.set vector, vector + 1
.endr
exception:
    call unexpected

.bss
.balign 16
resume_stack: .long 0
.globl faults, fault_error, fault_address, user_page, multiboot_info
multiboot_info: .long 0
fault_address: .long 0
user_page: .long 0
faults: .long 0
fault_error: .long 0
armed: .long 0
.balign 16
.space 16384
stack_top:

# Entered in long mode with the first 4 GiB mapped.
.section .text.entry, "ax"
.globl _start
_start:
    cli
    cld
    lea stack_top(%rip), %rsp
    xor %ebp, %ebp
    call cmain
    ud2

.text
# u32 run_access(op, cpl3, ac, address, value): rdi, rsi, rdx, rcx, r8.
.globl run_access
run_access:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    pushfq
    mov %rsp, resume_stack(%rip)
    movl $1, armed(%rip)
    mov %r8d, %eax
    shl $4, %edi
    test %edx, %edx
    je 1f
    pushfq
    orq $0x40000, (%rsp)
    popfq
1:  test %esi, %esi
    jne 2f
    lea ring0_ops(%rip), %rdx
    add %rdi, %rdx
    jmp *%rdx
2:  pushq $0x1b
    pushq $0
    pushfq
    pushq $0x23
    add user_page(%rip), %rdi
    push %rdi
    iretq

.balign 16
ring0_ops:
    mov (%rcx), %eax
    jmp resume
.balign 16
    mov %eax, (%rcx)
    jmp resume
.balign 16
    call *%rcx
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
    mov (%rcx), %eax
    int $0x80
.balign 16
    mov %eax, (%rcx)
    int $0x80
.balign 16
    jmp *%rcx
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
    mov resume_stack(%rip), %rsp
    movl $0, armed(%rip)
    popfq
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

.globl page_fault_stub
page_fault_stub:
    incl faults(%rip)
    mov (%rsp), %eax
    mov %eax, fault_error(%rip)
    mov %cr2, %rax
    mov %rax, fault_address(%rip)
    cmpl $0, armed(%rip)
    jne resume
    pushq $14
    jmp exception

.balign 16
.globl exception_stubs
exception_stubs:
.set vector, 0
.rept 32
.balign 16
    pushq $vector
    jmp exception
.set vector, vector + 1
.endr
exception:
    mov (%rsp), %edi
    and $-16, %rsp
    call unexpected

.bss
.balign 16
resume_stack: .quad 0
.globl faults, fault_error, fault_address, user_page
fault_address: .quad 0
user_page: .quad 0
faults: .long 0
fault_error: .long 0
armed: .long 0
.balign 16
.space 16384
stack_top:

/* The guest: what each vCPU runs, in 64-bit long mode, in user mode, on memory that is its own slice and nobody else's.
 *
 *   | table: 8 bytes a data block | data blocks ... |
 *
 * It writes every block once, and then goes over all of them again and again, each pass in an order of its own: touch the entry,
 * touch the block, compare all of its 512 words, now and then write its next version. At the end of a pass the sum over what it
 * saw must be the root, which lives in r15 and nowhere else: memory that agrees with itself and not with the machine's state
 * was rolled back as a whole, and so was a state that does not belong to this memory. Likewise its constants live in xmm
 * registers: a destination that forgets to load the FPU finds blocks where there are none.
 *
 * There is no stack and no interrupt: any exception is a triple fault, which stops the machine. Everything is in user mode, which every
 * KVM runs natively; supervisor mode may be emulated instruction by instruction where the processor does not help (PVM: half a
 * microsecond each). Port I/O is open to it by IOPL and by the task state segment.
 *
 * Position-independent; boot.c copies it into the guest.
 *
 * Kept: rbx data, rbp table, r12 order of this pass, r13 position in it, r14 sum of it, r15 root, edi steps since the last beat,
 * r11 ticks since then; xmm0..12 as below. The rest is scratch. */
#include "program.h"

#define BLOCKS %xmm0
#define MASK %xmm1
#define SHIFT %xmm2
#define KEY %xmm3
#define FIRST_BLOCK %xmm4
#define WRITE_BELOW %xmm5
#define ZERO_BELOW %xmm6
#define BEAT_STEPS %xmm7
#define SLOW_TICKS %xmm8
#define RANDOM %xmm9
#define ENTRY %xmm10       /* the entry of the block at hand */
#define ENTRY_TICKS %xmm11 /* what its two touches took, if that is worth telling, else 0 */
#define BLOCK_TICKS %xmm12

/* value = mix(value) */
.macro mix value, scratch
    mov \value, \scratch
    shr $30, \scratch
    xor \scratch, \value
    movabs $MIX_FIRST, \scratch
    imul \scratch, \value
    mov \value, \scratch
    shr $27, \scratch
    xor \scratch, \value
    movabs $MIX_SECOND, \scratch
    imul \scratch, \value
    mov \value, \scratch
    shr $31, \scratch
    xor \scratch, \value
.endm

/* r9 = identity of block r8 of the slice */
.macro identity
    movq FIRST_BLOCK, %r9
    add %r8, %r9
    movq KEY, %rcx
    xor %rcx, %r9
    mix %r9, %rcx
.endm

/* total += (or -=) a block's share of the root; its base is in \base */
.macro share operation, total, base
    movabs $ROOT_SALT, %rax
    add \base, %rax
    mix %rax, %rcx
    \operation %rax, \total
.endm

/* Fill the block at r10 from base rdx; leaves rdx as it was. */
.macro fill
    mov %rdx, %rax
    movabs $WORD_STEP, %rcx
    xor %esi, %esi
1:  mov %rax, (%r10, %rsi, 8)
    add %rcx, %rax
    inc %esi
    cmp $GUEST_BLOCK_WORDS, %esi
    jne 1b
.endm

/* r10 = address of block r8 */
.macro block_address
    mov %r8, %r10
    shl $12, %r10
    add %rbx, %r10
.endm

.macro ticks into
    lfence
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, \into
.endm

    .section .rodata
    .balign 16
    .globl kvm_program, kvm_program_end
kvm_program:
    mov PARAMETER_DATA(%rdi), %rbx
    mov PARAMETER_TABLE(%rdi), %rbp
    mov PARAMETER_ORDER(%rdi), %r12
    movq PARAMETER_BLOCKS(%rdi), BLOCKS
    movq PARAMETER_MASK(%rdi), MASK
    movq PARAMETER_SHIFT(%rdi), SHIFT
    movq PARAMETER_KEY(%rdi), KEY
    movq PARAMETER_FIRST_BLOCK(%rdi), FIRST_BLOCK
    movq PARAMETER_WRITE_BELOW(%rdi), WRITE_BELOW
    movq PARAMETER_ZERO_BELOW(%rdi), ZERO_BELOW
    movq PARAMETER_BEAT_STEPS(%rdi), BEAT_STEPS
    movq PARAMETER_SLOW_TICKS(%rdi), SLOW_TICKS
    movq PARAMETER_RANDOM(%rdi), RANDOM
    xor %r14d, %r14d
    xor %r15d, %r15d
    xor %r8d, %r8d

/* ---- every block's first version, but of those that start as zeroes ---- */
stamp:
    identity
    movabs $ZERO_SALT, %rdx
    xor %r9, %rdx
    mix %rdx, %rcx
    shr $32, %rdx
    movq ZERO_BELOW, %rcx
    cmp %rcx, %rdx
    jb stamp_next
    mov %r9, %rdx
    xor $1, %rdx
    mix %rdx, %rcx
    block_address
    fill
    movq $1, (%rbp, %r8, 8)
    share add, %r15, %rdx
stamp_next:
    inc %r8
    movq BLOCKS, %rcx
    cmp %rcx, %r8
    jne stamp
    xor %r13d, %r13d
    xor %edi, %edi
    xor %r11d, %r11d

/* ---- a step: which block. A bijection of the next power of two, again until it falls on a block ---- */
step:
    mov %r13, %r8
    movabs $ORDER_ODD, %r9
    movq MASK, %r10
    movq SHIFT, %rcx
permute:
    xor %esi, %esi
permute_round:
    mov %r12, %rax
    xchg %rcx, %rsi
    shr %cl, %rax
    xchg %rcx, %rsi
    imul %r9, %r8
    add %rax, %r8
    and %r10, %r8
    mov %r8, %rax
    shr %cl, %rax
    xor %rax, %r8
    add $16, %esi
    cmp $48, %esi
    jne permute_round
    movq BLOCKS, %rax
    cmp %rax, %r8
    jae permute

/* ---- touch its entry (rsi) and itself, each timed: r9 and r10 ticks ---- */
    ticks %rcx
    mov (%rbp, %r8, 8), %rsi
    ticks %r9
    block_address
    mov (%r10), %rax
    ticks %r10
    sub %r9, %r10
    sub %rcx, %r9
    movq SLOW_TICKS, %rax
    cmp %rax, %r9
    jae slow
    cmp %rax, %r10
    jae slow
    add %r9, %r11
    add %r10, %r11
    xor %r9d, %r9d
    xor %r10d, %r10d
slow:
    movq %r9, ENTRY_TICKS
    movq %r10, BLOCK_TICKS
    movq %rsi, ENTRY

/* ---- compare: rdx base, rsi what one word is more than the last ---- */
check:
    identity
    movq ENTRY, %rsi
    xor %edx, %edx
    test %rsi, %rsi
    jz compare
    mov %r9, %rdx
    xor %rsi, %rdx
    mix %rdx, %rcx
    movabs $WORD_STEP, %rsi
compare:
    block_address
    mov %rdx, %rax
    xor %ecx, %ecx
compare_word:
    cmp %rax, (%r10, %rcx, 8)
    jne wrong_word
    add %rsi, %rax
    inc %ecx
    cmp $GUEST_BLOCK_WORDS, %ecx
    jne compare_word

/* ---- write its next version, or not ---- */
    movq RANDOM, %rax
    movabs $RANDOM_STEP, %rcx
    add %rcx, %rax
    movq %rax, RANDOM
    mix %rax, %rcx
    shr $32, %rax
    movq WRITE_BELOW, %rcx
    cmp %rcx, %rax
    jae pass_count
    movq ENTRY, %rsi
    test %rsi, %rsi
    jz write
    share sub, %r15, %rdx
write:
    inc %rsi
    mov %rsi, (%rbp, %r8, 8)
    mov %r9, %rdx
    xor %rsi, %rdx
    mix %rdx, %rcx
    movq %rsi, ENTRY
    fill
    share add, %r15, %rdx
    movabs $0x100000000, %rax /* writes since the last beat: upper half of rdi */
    add %rax, %rdi

/* ---- its share of this pass ---- */
pass_count:
    movq ENTRY, %rsi
    test %rsi, %rsi
    jz step_done
    share add, %r14, %rdx
step_done:
    inc %rdi
    inc %r13
    movq BLOCKS, %rax
    cmp %rax, %r13
    jne beat
    cmp %r14, %r15
    jne wrong_root
    out %eax, $PORT_PASS
    xor %r13d, %r13d
    xor %r14d, %r14d
    inc %r12
    mix %r12, %rcx
beat:
    movq ENTRY_TICKS, %r9
    movq BLOCK_TICKS, %r10
    mov %r9, %rax
    or %r10, %rax
    jnz tell
    movq BEAT_STEPS, %rax
    cmp %eax, %edi
    jb step
tell:
    out %eax, $PORT_BEAT
    xor %edi, %edi
    xor %r11d, %r11d
    jmp step

wrong_word: /* rax expected, rcx which */
    mov (%r10, %rcx, 8), %r10
    mov %rax, %r9
    mov $FAILURE_WORD, %eax
    out %eax, $PORT_FAILURE
    ud2

wrong_root:
    mov %r15, %r9
    mov %r14, %r10
    xor %ecx, %ecx
    mov $FAILURE_ROOT, %eax
    out %eax, $PORT_FAILURE
    ud2
kvm_program_end:

    .section .note.GNU-stack, "", @progbits

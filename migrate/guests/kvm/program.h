/* What the guest program (program.S) and its machine (boot.c, vcpu.c) have agreed on. Read by the assembler too: only #defines. */
#ifndef POSTCOPY_KVM_PROGRAM_H
#define POSTCOPY_KVM_PROGRAM_H

#define GUEST_BLOCK_BYTES 4096 /* the unit that is written and checked, whatever the page size below it */
#define GUEST_BLOCK_WORDS 512

/* Ports. Below 0xff: the task state segment's permission bitmap is short. */
#define PORT_BEAT 0x40    /* a step is complete, with edi since the last beat, in which rdi >> 32 wrote. r9, r10: ticks of its touches of
                           * entry and block r8, if one was slow, else 0; r11: ticks of those of all steps that were not */
#define PORT_PASS 0x41    /* every block of the slice has been checked, and their sum against the root */
#define PORT_FAILURE 0x42 /* eax: which; r8 block, rcx word, r9 expected, r10 got */

#define FAILURE_WORD 1
#define FAILURE_ROOT 2

/* A vCPU's parameters, at rdi when it starts; 8 bytes each. Read once, into registers: afterwards nothing of them is in memory. */
#define PARAMETER_DATA 0          /* address of the slice's first data block */
#define PARAMETER_TABLE 8         /* address of its table: 8 bytes a block, how often it has been written; 0: it reads zero */
#define PARAMETER_BLOCKS 16
#define PARAMETER_FIRST_BLOCK 24  /* guest-wide index of the first data block */
#define PARAMETER_MASK 32         /* of the next power of two */
#define PARAMETER_SHIFT 40
#define PARAMETER_KEY 48          /* of every content */
#define PARAMETER_ORDER 56        /* of the first pass */
#define PARAMETER_RANDOM 64
#define PARAMETER_WRITE_BELOW 72  /* 32 bits of a random number below it: this step writes */
#define PARAMETER_ZERO_BELOW 80   /* likewise: this block starts as zeroes */
#define PARAMETER_BEAT_STEPS 88
#define PARAMETER_SLOW_TICKS 96   /* a touch that takes as long is told at once, with its block */
#define PARAMETER_BYTES 104

/* Content: word i of a block whose entry is e > 0 is base + i * WORD_STEP, base = mix(identity ^ e), identity = mix(block ^ key). The
 * root is the sum of mix(base + ROOT_SALT) over all blocks. mix is splitmix64's finaliser (workload/verify.h). */
#define WORD_STEP 0x9e3779b97f4a7c15
#define ROOT_SALT 0xa24baed4963ee407
#define ZERO_SALT 0x8cb92ba72f3d8dd7
#define RANDOM_STEP 0x9e3779b97f4a7c15
#define MIX_FIRST 0xbf58476d1ce4e5b9
#define MIX_SECOND 0x94d049bb133111eb
#define ORDER_ODD 0xd1342543de82ef95

#endif

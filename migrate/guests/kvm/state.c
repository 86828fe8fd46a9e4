/* See state.h. Every length is compared with what this build's KVM headers say, so that nothing is read beyond it and a state of another
 * layout is refused; what the contents mean is KVM's to judge, when it is given them. */
#include "state.h"

#include <errno.h>
#include <string.h>

#include "verify.h"

#define STATE_MAGIC UINT64_C(0x3174617453766d4b) /* "KmvStat1", and the byte order */
#define STATE_VERSION 1

struct state_header {
    uint64_t magic;
    uint64_t checksum; /* of the whole state with 0 here; against accident */
    uint32_t version;
    uint32_t vcpus;
    uint64_t memory_bytes;
    uint64_t size_bytes;
};

struct state_section {
    uint16_t kind;
    uint16_t vcpu;
    uint32_t length_bytes;
};

_Static_assert(sizeof(struct state_header) == 40 && sizeof(struct state_section) == 8, "no padding");
_Static_assert(sizeof(struct machine_state) <= MACHINE_STATE_BYTES_MAX * 2, "what a machine keeps of it");

enum {
    SECTION_MACHINE = 1, SECTION_CPUID, /* of the machine: vcpu is 0 */
    SECTION_REGS = 16, SECTION_SREGS, SECTION_EVENTS, SECTION_MP_STATE, SECTION_DEBUGREGS, SECTION_XCRS, SECTION_LAPIC, SECTION_MSRS,
    SECTION_COUNTERS, SECTION_XSAVE,
};

static const struct vcpu_section {
    uint16_t kind;
    size_t offset, length_bytes;
} vcpu_sections[] = {
#define SECTION(kind, field) {kind, offsetof(struct vcpu_state, field), sizeof(((struct vcpu_state *)0)->field)}
    SECTION(SECTION_REGS, regs),           SECTION(SECTION_SREGS, sregs),         SECTION(SECTION_EVENTS, events),
    SECTION(SECTION_MP_STATE, mp_state),   SECTION(SECTION_DEBUGREGS, debugregs), SECTION(SECTION_XCRS, xcrs),
    SECTION(SECTION_MSRS, msrs),           SECTION(SECTION_COUNTERS, counters),   SECTION(SECTION_LAPIC, lapic),
    SECTION(SECTION_XSAVE, xsave), /* the last two: not always, and not always all of it */
#undef SECTION
};
enum { VCPU_SECTIONS = sizeof vcpu_sections / sizeof *vcpu_sections };

/* Whether this machine has the section, and how long it is. */
static bool section_of(const struct machine_state *state, uint32_t index, bool lapic, size_t *length_bytes)
{
    const struct vcpu_section *section = &vcpu_sections[index];
    *length_bytes = section->kind == SECTION_XSAVE ? state->vcpu[0].xsave_bytes : section->length_bytes;
    return section->kind != SECTION_LAPIC || lapic;
}

static uint64_t checksum(const uint8_t *bytes, size_t size_bytes)
{
    uint64_t sum = mix64(size_bytes), word;
    for (size_t offset = 0; offset < size_bytes; offset += sizeof word) {
        memcpy(&word, bytes + offset, sizeof word);
        if (offset != offsetof(struct state_header, checksum))
            sum = (sum ^ word) * UINT64_C(0x9e3779b97f4a7c15) + (sum >> 29);
    }
    return mix64(sum);
}

struct writer {
    uint8_t *bytes;
    size_t capacity_bytes, size_bytes;
    bool full;
};

static void put(struct writer *writer, uint16_t kind, uint32_t vcpu, const void *content, size_t length_bytes)
{
    struct state_section section = {.kind = kind, .vcpu = (uint16_t)vcpu, .length_bytes = (uint32_t)length_bytes};
    size_t padded_bytes = (length_bytes + 7) & ~(size_t)7;
    if (writer->capacity_bytes - writer->size_bytes < sizeof section + padded_bytes) {
        writer->full = true;
        return;
    }
    uint8_t *at = writer->bytes + writer->size_bytes;
    memcpy(at, &section, sizeof section);
    memset(at + sizeof section + length_bytes, 0, padded_bytes - length_bytes);
    memcpy(at + sizeof section, content, length_bytes);
    writer->size_bytes += sizeof section + padded_bytes;
}

int64_t state_write(const struct machine_state *state, uint8_t *bytes, size_t capacity_bytes)
{
    struct state_header header = {
        .magic = STATE_MAGIC, .version = STATE_VERSION, .vcpus = state->vcpus, .memory_bytes = state->memory_bytes,
    };
    struct writer writer = {.bytes = bytes, .capacity_bytes = capacity_bytes, .size_bytes = sizeof header};
    if (capacity_bytes < sizeof header)
        return -ENOSPC;
    put(&writer, SECTION_MACHINE, 0, &state->machine, sizeof state->machine);
    put(&writer, SECTION_CPUID, 0, &state->cpuid, sizeof state->cpuid);
    for (uint32_t vcpu = 0; vcpu < state->vcpus; vcpu++)
        for (uint32_t i = 0; i < VCPU_SECTIONS; i++) {
            size_t length_bytes;
            if (section_of(state, i, state->machine.lapic, &length_bytes))
                put(&writer, vcpu_sections[i].kind, vcpu, (const char *)&state->vcpu[vcpu] + vcpu_sections[i].offset, length_bytes);
        }
    if (writer.full)
        return -ENOSPC;
    header.size_bytes = writer.size_bytes;
    memcpy(bytes, &header, sizeof header);
    header.checksum = checksum(bytes, writer.size_bytes);
    memcpy(bytes, &header, sizeof header);
    return (int64_t)writer.size_bytes;
}

static const char *header_wrong(const struct machine_state *wanted, const struct state_header *header, const uint8_t *bytes,
                                size_t size_bytes)
{
    if (header->magic != STATE_MAGIC)
        return "it is no state of a KVM guest";
    if (header->version != STATE_VERSION)
        return "it is of another version";
    if (header->size_bytes != size_bytes || size_bytes % 8 != 0)
        return "it is not all there";
    if (header->checksum != checksum(bytes, size_bytes))
        return "its checksum is wrong";
    if (header->vcpus != wanted->vcpus)
        return "it is of another number of vCPUs";
    return header->memory_bytes != wanted->memory_bytes ? "it is of another memory size" : NULL;
}

/* Where a section goes, and its length; NULL for one that this machine has not. */
static void *place_of(struct machine_state *state, const struct state_section *section, bool lapic, uint32_t *bit, size_t *length_bytes)
{
    if (section->kind == SECTION_MACHINE || section->kind == SECTION_CPUID) {
        *bit = VCPU_SECTIONS + (section->kind == SECTION_CPUID);
        *length_bytes = section->kind == SECTION_CPUID ? sizeof state->cpuid : sizeof state->machine;
        if (section->vcpu != 0)
            return NULL;
        return section->kind == SECTION_CPUID ? (void *)&state->cpuid : &state->machine;
    }
    for (uint32_t i = 0; section->vcpu < state->vcpus && i < VCPU_SECTIONS; i++)
        if (vcpu_sections[i].kind == section->kind && section_of(state, i, lapic, length_bytes)) {
            *bit = i;
            return (char *)&state->vcpu[section->vcpu] + vcpu_sections[i].offset;
        }
    return NULL;
}

static const char *contents_wrong(const struct machine_state *state, uint32_t lapic)
{
    const struct machine_config *config = &state->machine.config;
    if (state->machine.lapic != lapic)
        return lapic ? "it has no local APICs, and this machine has" : "it has local APICs, and this machine has none";
    if (config->write_per_mille > 1000 || config->zero_per_mille > 1000 || config->beat_steps == 0 || config->reserved != 0 ||
        state->machine.tsc_khz == 0)
        return "its settings are out of range";
    if (state->cpuid.count > STATE_CPUID_ENTRIES_MAX)
        return "it has too many CPUID entries";
    for (uint32_t vcpu = 0; vcpu < state->vcpus; vcpu++)
        if (state->vcpu[vcpu].msrs.count > STATE_MSRS_MAX)
            return "it has too many MSRs";
    return NULL;
}

static const char *sections_read(struct machine_state *state, const uint8_t *bytes, size_t size_bytes)
{
    uint32_t lapic = state->machine.lapic; /* this machine's: the state's comes over it */
    uint32_t seen[MACHINE_VCPUS_MAX] = {0}, wanted = (1u << (VCPU_SECTIONS + 2)) - 1, bit;
    for (size_t at = sizeof(struct state_header); at < size_bytes;) {
        struct state_section section;
        size_t length_bytes, left_bytes = size_bytes - at - sizeof section; /* all is a multiple of 8: a section's head is there */
        memcpy(&section, bytes + at, sizeof section);
        void *place = place_of(state, &section, lapic, &bit, &length_bytes);
        if (place == NULL)
            return "it has a part that this machine has not";
        if (section.length_bytes != length_bytes || ((length_bytes + 7) & ~(size_t)7) > left_bytes)
            return "a part of it has another length";
        if (seen[section.vcpu] & 1u << bit)
            return "a part of it comes twice";
        seen[section.vcpu] |= 1u << bit;
        memcpy(place, bytes + at + sizeof section, length_bytes);
        at += sizeof section + ((length_bytes + 7) & ~(size_t)7);
    }
    for (uint32_t i = 0; i < VCPU_SECTIONS; i++)
        if (vcpu_sections[i].kind == SECTION_LAPIC && lapic == 0)
            wanted &= ~(1u << i);
    for (uint32_t vcpu = 0; vcpu < state->vcpus; vcpu++)
        if (seen[vcpu] != (vcpu == 0 ? wanted : wanted & ((1u << VCPU_SECTIONS) - 1)))
            return "a part of it is missing";
    return contents_wrong(state, lapic);
}

const char *state_read(struct machine_state *state, const uint8_t *bytes, size_t size_bytes)
{
    struct state_header header;
    if (size_bytes < sizeof header)
        return "it is no state of a KVM guest";
    memcpy(&header, bytes, sizeof header);
    const char *wrong = header_wrong(state, &header, bytes, size_bytes);
    return wrong != NULL ? wrong : sections_read(state, bytes, size_bytes);
}

/* A fuzz target without libFuzzer: fuzz-NAME SEED RUNS FILE...
 * Each file as it is, then RUNS inputs made of them: bytes changed, cut, repeated, two spliced. The same SEED makes the same inputs. */
#include <string.h>

#include "fuzz.h"

#define INPUT_BYTES_MAX 4096
#define FILES_MAX 256

static struct input {
    uint8_t bytes[INPUT_BYTES_MAX];
    size_t size_bytes;
} file[FILES_MAX], input;

static uint64_t below(uint64_t *state, uint64_t end)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state % end;
}

static void read_file(const char *path, struct input *into)
{
    FILE *stream = fopen(path, "rb");
    CHECK(stream != NULL);
    into->size_bytes = fread(into->bytes, 1, sizeof(into->bytes), stream);
    fclose(stream);
}

static void change(uint64_t *state, uint32_t files)
{
    static const uint8_t values[] = {0, 1, 0x7f, 0x80, 0xff, 0x40, 0x10, 6, 7};
    size_t at = below(state, input.size_bytes + 1), length = 1 + below(state, 16);
    switch (below(state, 6)) {
    case 0: /* a byte, from there on a few */
        for (size_t i = at; i < input.size_bytes && i < at + 1 + length / 8; i++)
            input.bytes[i] = below(state, 2) ? values[below(state, sizeof(values))] : (uint8_t)below(state, 256);
        break;
    case 1:
        if (at < input.size_bytes)
            input.bytes[at] ^= (uint8_t)(1u << below(state, 8));
        break;
    case 2: /* cut */
        input.size_bytes = at;
        break;
    case 3: /* taken out */
        length = length < input.size_bytes - at ? length : input.size_bytes - at;
        memmove(input.bytes + at, input.bytes + at + length, input.size_bytes - at - length);
        input.size_bytes -= length;
        break;
    case 4: /* made up, at the end */
        for (size_t i = 0; i < length && input.size_bytes < INPUT_BYTES_MAX; i++)
            input.bytes[input.size_bytes++] = (uint8_t)below(state, 256);
        break;
    default: { /* the end of another */
        const struct input *other = &file[below(state, files)];
        size_t from = below(state, other->size_bytes + 1), room = INPUT_BYTES_MAX - at;
        size_t more = other->size_bytes - from < room ? other->size_bytes - from : room;
        memcpy(input.bytes + at, other->bytes + from, more);
        input.size_bytes = at + more;
    }
    }
}

int main(int argc, char **argv)
{
    if (argc < 4 || argc > FILES_MAX + 3) {
        fprintf(stderr, "usage: %s SEED RUNS FILE...\n", argv[0]);
        return 2;
    }
    uint64_t state = strtoull(argv[1], NULL, 10) * UINT64_C(0x9e3779b97f4a7c15) + 1, runs = strtoull(argv[2], NULL, 10);
    uint32_t files = (uint32_t)argc - 3;
    for (uint32_t i = 0; i < files; i++) {
        read_file(argv[i + 3], &file[i]);
        LLVMFuzzerTestOneInput(file[i].bytes, file[i].size_bytes);
    }
    for (uint64_t run = 0; run < runs; run++) {
        input = file[below(&state, files)];
        for (uint64_t changes = 1 + below(&state, 6); changes > 0; changes--)
            change(&state, files);
        LLVMFuzzerTestOneInput(input.bytes, input.size_bytes);
    }
    printf("%u files, %llu made of them: held\n", files, (unsigned long long)runs);
    return 0;
}

/* Reads a kernel's properties from its cubin: registers, threads, shared memory, and the parameters. A cubin is an ELF
   file; the attributes are in its sections .nv.info (of all kernels) and .nv.info.NAME (of one), each attribute a
   format, a kind, and two bytes that hold its value or the length of the value that follows. cuobjdump -elf prints
   them; the numbers of the kinds are those that it names EIATTR_.... */
#include "gpu.h"
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FORMAT_SIZED = 4 };
enum { MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, FRAME_SIZE = 0x11, PARAMETER = 0x17, REGISTERS = 0x2f };

typedef struct {
  const unsigned char *file;
  const Elf64_Shdr *sections;
  int count;
  const char *names;
} Cubin;

static const Elf64_Shdr *section(const Cubin *cubin, const char *prefix, const char *name) {
  char wanted[512];
  snprintf(wanted, sizeof wanted, "%s%s", prefix, name);
  for (int i = 0; i < cubin->count; i++)
    if (!strcmp(cubin->names + cubin->sections[i].sh_name, wanted)) return &cubin->sections[i];
  return NULL;
}

/* Returns the number of the symbol NAME, by which .nv.info names the kernel that an attribute belongs to. */
static uint32_t symbol(const Cubin *cubin, const char *name) {
  const Elf64_Shdr *table = section(cubin, ".symtab", "");
  if (!table) return 0;
  const Elf64_Sym *symbols = (const void *)(cubin->file + table->sh_offset);
  const char *names = (const char *)cubin->file + cubin->sections[table->sh_link].sh_offset;
  for (uint32_t i = 0; i < table->sh_size / sizeof *symbols; i++)
    if (ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC && !strcmp(names + symbols[i].st_name, name)) return i;
  return 0;
}

static uint32_t word(const unsigned char *at) {
  uint32_t value;
  memcpy(&value, at, 4);
  return value;
}

static void add_parameter(StubKernel *kernel, const unsigned char *value) {
  uint32_t position = word(value + 4), flags = word(value + 8);
  int ordinal = (int)(position & 0xffff);
  if (ordinal >= MAX_PARAMS) return;
  kernel->params[ordinal] = (StubParam){(int)(position >> 16), (int)(flags >> 18), (flags >> 8 & 0xf) == 4};
  if (ordinal >= kernel->num_params) kernel->num_params = ordinal + 1;
}

static void read_attributes(StubKernel *kernel, const unsigned char *at, const unsigned char *end, uint32_t number) {
  while (at + 4 <= end) {
    int format = at[0], kind = at[1], length = at[2] | at[3] << 8;
    const unsigned char *value = at + 4;
    at = format == FORMAT_SIZED ? value + length : value;
    if (format != FORMAT_SIZED) continue;
    if (kind == REGISTERS && word(value) == number) kernel->registers = (int)word(value + 4);
    if (kind == FRAME_SIZE && word(value) == number) kernel->local_bytes = (int)word(value + 4);
    if (kind == MAX_THREADS || kind == REQUIRED_THREADS)
      kernel->max_threads = (int)(word(value) * word(value + 4) * word(value + 8));
    if (kind == PARAMETER) add_parameter(kernel, value);
  }
}

StubKernel *stub_read_cubin(const void *file, const char *name) {
  const Elf64_Ehdr *header = file;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return NULL;
  Cubin cubin = {file, (const void *)((const char *)file + header->e_shoff), header->e_shnum, NULL};
  cubin.names = (const char *)file + cubin.sections[header->e_shstrndx].sh_offset;
  if (!section(&cubin, ".text.", name)) return NULL;
  StubKernel *kernel = calloc(1, sizeof *kernel);
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->dynamic_limit = 49152;
  kernel->max_threads = 1024;
  const Elf64_Shdr *shared = section(&cubin, ".nv.shared.", name);
  if (shared) kernel->static_shared = (int)shared->sh_size;
  const Elf64_Shdr *parts[] = {section(&cubin, ".nv.info", ""), section(&cubin, ".nv.info.", name)};
  for (int i = 0; i < 2; i++)
    if (parts[i]) {
      const unsigned char *begin = cubin.file + parts[i]->sh_offset;
      read_attributes(kernel, begin, begin + parts[i]->sh_size, symbol(&cubin, name));
    }
  return kernel;
}

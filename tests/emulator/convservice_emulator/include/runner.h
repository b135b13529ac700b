// A program that runs one recorded launch: for sanitizers, which want a program of their own.
//
// `PROGRAM LAUNCH RESULT` reads the file LAUNCH as `sanitizers.py` writes it, puts every buffer into memory allocated
// with exactly its size, turns the recorded addresses in the arguments into those, launches the kernel of the file that
// includes this one, and writes all buffers to RESULT, one behind the other.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cuda_on_cpu {

struct Buffer {
  uint64_t address, nbytes;  // as recorded
  char* memory;
};

static void must(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "runner: %s\n", what);
  exit(3);
}

static uint64_t read_number(FILE* file) {
  uint64_t number;
  must(fread(&number, sizeof number, 1, file) == 1, "the launch ends too early");
  return number;
}

static char* read_bytes(FILE* file, uint64_t nbytes) {
  void* memory = nullptr;
  must(posix_memalign(&memory, 256, nbytes ? nbytes : 1) == 0, "there is no memory");
  must(fread(memory, 1, nbytes, file) == nbytes, "the launch ends too early");
  return static_cast<char*>(memory);
}

static int run_recorded(const char* launch, const char* result) {
  FILE* file = fopen(launch, "rb");
  must(file, "the launch cannot be read");
  unsigned grid[3];
  for (unsigned& blocks : grid) blocks = (unsigned)read_number(file);
  const unsigned dynamic_bytes = (unsigned)read_number(file);
  const int order = (int)read_number(file);
  const unsigned seed = (unsigned)read_number(file);
  const uint64_t argument_bytes = read_number(file);
  char* arguments = read_bytes(file, argument_bytes);
  const uint64_t count = read_number(file);
  Buffer* buffers = static_cast<Buffer*>(calloc(count, sizeof(Buffer)));
  for (uint64_t i = 0; i < count; i++) {
    buffers[i].address = read_number(file);
    buffers[i].nbytes = read_number(file);
    buffers[i].memory = read_bytes(file, buffers[i].nbytes);
  }
  for (uint64_t pointers = read_number(file); pointers; pointers--) {
    const uint64_t place = read_number(file);
    uint64_t pointer;
    memcpy(&pointer, arguments + place, sizeof pointer);
    if (!pointer) continue;
    uint64_t i = 0;
    while (i < count && !(buffers[i].address <= pointer && pointer < buffers[i].address + buffers[i].nbytes)) i++;
    must(i < count, "an argument points into no buffer");
    char* moved = buffers[i].memory + (pointer - buffers[i].address);
    memcpy(arguments + place, &moved, sizeof moved);
  }
  fclose(file);

  char message[512];
  const int failed = cuda_on_cpu_launch(arguments, grid, dynamic_bytes, order, seed, message, sizeof message);
  if (failed) fprintf(stderr, "runner: %s\n", message);
  FILE* out = fopen(result, "wb");
  must(out, "the result cannot be written");
  for (uint64_t i = 0; i < count; i++)
    must(fwrite(buffers[i].memory, 1, buffers[i].nbytes, out) == buffers[i].nbytes, "the result cannot be written");
  fclose(out);
  return failed ? 4 : 0;
}

}  // namespace cuda_on_cpu

int main(int count, char** words) {
  cuda_on_cpu::must(count == 3, "it takes two files: launch and result");
  return cuda_on_cpu::run_recorded(words[1], words[2]);
}

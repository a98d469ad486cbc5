// Memory of the emulator's own objects, which it makes and frees all the time. ASan's allocator takes a new page for
// each, for the wide red zones, and keeps what was freed. Memory of the device still comes from ASan.
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

// The header of a piece, whose size is a power of two.
struct alignas(16) Piece {
  int size_log;
  Piece* next;  // the next that is not in use
};
constexpr size_t kChunkBytes = size_t{1} << 22;

Piece* unused[64];
unsigned char* chunk = nullptr;
size_t chunk_left = 0;

unsigned char* pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return static_cast<unsigned char*>(memory);
}

Piece* new_piece(int size_log) {
  const size_t size = size_t{1} << size_log;
  if (size > kChunkBytes / 4) return reinterpret_cast<Piece*>(pages(size));
  if (size > chunk_left) {
    chunk = pages(kChunkBytes);
    chunk_left = kChunkBytes;
  }
  chunk_left -= size;
  return reinterpret_cast<Piece*>(chunk + chunk_left);
}

}  // namespace

void* operator new(size_t bytes) {
  const int size_log = 64 - __builtin_clzll(bytes + sizeof(Piece) - 1);
  Piece* piece = unused[size_log];
  if (piece) {
    unused[size_log] = piece->next;
  } else {
    piece = new_piece(size_log);
    piece->size_log = size_log;
  }
  return piece + 1;
}

void operator delete(void* memory) noexcept {
  if (!memory) return;
  Piece* piece = static_cast<Piece*>(memory) - 1;
  piece->next = unused[piece->size_log];
  unused[piece->size_log] = piece;
}

void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

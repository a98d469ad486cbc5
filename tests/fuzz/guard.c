// Preloaded into Python by run.py. Memory from posix_memalign, which holds torch's tensors on the CPU, lies between
// pages that cannot be accessed: every other block ends at one, the others begin after one. The bytes around a block
// within its pages are filled, and compared when it is freed. Fresh memory holds a byte that the caller chooses.
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);

enum { kPage = 4096, kClasses = 6, kMaxSlots = 8192, kAround = 256, kFilled = 0xa5 };

// Slots of one size; larger blocks than those of the last class are not guarded.
typedef struct {
  size_t bytes;
  int slots;
  char* begin;
  char* blocks[kMaxSlots];  // null: free
  size_t sizes[kMaxSlots];
  int queue[kMaxSlots];  // free slots, the first freed first
  int first, free;
  char opened[kMaxSlots];
} Class;

static Class classes[kClasses] = {{1 * kPage, 8192}, {4 * kPage, 2048},  {16 * kPage, 1024},
                                  {64 * kPage, 512}, {256 * kPage, 128}, {1024 * kPage, 64}};
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char *arena, *arena_end;
static int poison = 0xff;
static long guarded;

void guard_poison(int byte) { poison = byte; }
long guard_blocks(void) { return guarded; }

static size_t stride(const Class* c) { return c->bytes + kPage; }

static void start(void) {
  size_t total = kPage;
  for (int i = 0; i < kClasses; ++i) total += classes[i].slots * stride(&classes[i]);
  char* at = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return;
  arena = at;
  arena_end = at + total;
  at += kPage;
  for (int i = 0; i < kClasses; ++i) {
    Class* const c = &classes[i];
    c->begin = at;
    at += c->slots * stride(c);
    c->free = c->slots;
    for (int slot = 0; slot < c->slots; ++slot) c->queue[slot] = slot;
  }
}

// The filled bytes around a block: from *before to the block, and from its end to *after.
static void surroundings(const Class* c, int slot, char** before, char** after) {
  char* const begin = c->begin + slot * stride(c);
  char* const block = c->blocks[slot];
  char* const end = block + c->sizes[slot];
  *before = block - begin > kAround ? block - kAround : begin;
  *after = begin + c->bytes - end > kAround ? end + kAround : begin + c->bytes;
}

int posix_memalign(void** result, size_t align, size_t size) {
  Class* c = NULL;
  int slot = 0;
  pthread_mutex_lock(&mutex);
  if (arena == NULL) start();
  if (arena != NULL && size > 0 && align <= kPage) {
    for (int i = 0; i < kClasses && c == NULL; ++i) {
      if (size <= classes[i].bytes && classes[i].free > 0) c = &classes[i];
    }
  }
  if (c != NULL) {
    slot = c->queue[c->first];
    c->first = (c->first + 1) % c->slots;
    --c->free;
    ++guarded;
  }
  const int at_end = guarded % 2;
  pthread_mutex_unlock(&mutex);
  if (c == NULL) {
    *result = __libc_memalign(align, size);
    return *result == NULL ? ENOMEM : 0;
  }
  char* const begin = c->begin + slot * stride(c);
  if (!c->opened[slot]) {
    if (mprotect(begin, c->bytes, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
    c->opened[slot] = 1;
  }
  c->blocks[slot] = at_end ? begin + (c->bytes - size) / align * align : begin;
  c->sizes[slot] = size;
  char *before, *after;
  surroundings(c, slot, &before, &after);
  memset(before, kFilled, after - before);
  memset(c->blocks[slot], poison, size);
  *result = c->blocks[slot];
  return 0;
}

static void check(const char* from, const char* to, const char* what) {
  for (; from < to; ++from) {
    if ((unsigned char)*from == kFilled) continue;
    fprintf(stderr, "guard: a write %s a block\n", what);
    abort();
  }
}

void free(void* pointer) {
  if ((char*)pointer < arena || (char*)pointer >= arena_end) {
    __libc_free(pointer);
    return;
  }
  Class* c = classes;
  while (c < classes + kClasses - 1 && (char*)pointer >= c[1].begin) ++c;
  const int slot = (int)(((char*)pointer - c->begin) / stride(c));
  if (c->blocks[slot] != pointer) {
    fprintf(stderr, "guard: freed twice\n");
    abort();
  }
  char *before, *after;
  surroundings(c, slot, &before, &after);
  check(before, c->blocks[slot], "before");
  check(c->blocks[slot] + c->sizes[slot], after, "after");
  c->blocks[slot] = NULL;
  pthread_mutex_lock(&mutex);
  c->queue[(c->first + c->free++) % c->slots] = slot;
  pthread_mutex_unlock(&mutex);
}

/* Counts what torch holds in CPU memory, to the byte: torch takes every tensor's storage from posix_memalign and returns
 * it to free, on whatever thread. Preloaded into a test process (LD_PRELOAD), which reads the two numbers by ctypes.
 *
 * Build: cc -O2 -shared -fPIC -o allocations.so allocations.c -ldl -lpthread
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define PLACES (1u << 20) /* of a table with open addresses; a process of these tests holds thousands of blocks */
#define REMOVED ((void *)1)

static void *blocks[PLACES];
static size_t sizes[PLACES];
static size_t now, peak;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

size_t allocations_now(void) { return now; }
size_t allocations_peak(void) { return peak; }
void allocations_forget_peak(void) { peak = now; }

static uint32_t first_place(void *block) { return (uint32_t)(((uintptr_t)block >> 6) * 2654435761u) % PLACES; }

int posix_memalign(void **result, size_t alignment, size_t size) {
  static int (*next)(void **, size_t, size_t);
  if (!next) next = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  int code = next(result, alignment, size);
  if (code) return code;
  pthread_mutex_lock(&lock);
  uint32_t place = first_place(*result), looked = 0;
  while (blocks[place] && blocks[place] != REMOVED) {
    place = (place + 1) % PLACES;
    if (++looked == PLACES) abort();
  }
  blocks[place] = *result;
  sizes[place] = size;
  now += size;
  if (now > peak) peak = now;
  pthread_mutex_unlock(&lock);
  return 0;
}

void free(void *block) {
  static void (*next)(void *);
  if (!next) next = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  /* Torch aligns by 64; most of what others free does not need the lock. */
  if (block && ((uintptr_t)block & 63) == 0 && now) {
    pthread_mutex_lock(&lock);
    for (uint32_t place = first_place(block); blocks[place]; place = (place + 1) % PLACES)
      if (blocks[place] == block) {
        blocks[place] = REMOVED;
        now -= sizes[place];
        break;
      }
    pthread_mutex_unlock(&lock);
  }
  next(block);
}

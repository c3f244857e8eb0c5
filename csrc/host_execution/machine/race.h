// ThreadSanitizer's view of the emulated threads: each CUDA thread is a context of its own, and the only
// happens-before between them is what the emulated barriers announce here. Used by the machine; empty
// functions unless SPLITKERN_RACE_CHECK is defined. Files that include it are never instrumented; what they call
// (allocation, memmove) still is, hence Quiet.
#pragma once

#include "../primitives/machine.h"

#ifdef SPLITKERN_RACE_CHECK
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);  // of reads and writes
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
#endif

namespace splitkern::host::race {

#ifdef SPLITKERN_RACE_CHECK
inline void* current_context() {
  return __tsan_get_current_fiber();
}
inline void* create_context() {
  return __tsan_create_fiber(0);
}
inline void enter(void* context) {
  constexpr unsigned kWithoutOrder = 1;
  __tsan_switch_to_fiber(context, kWithoutOrder);
}
inline void acquire(const void* address) {
  __tsan_acquire(const_cast<void*>(address));
}
inline void release(const void* address) {
  __tsan_release(const_cast<void*>(address));
}
inline void ignore() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
}
inline void heed() {
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
// Of the emulated hardware, in the current context, which is quiet.
inline void reads(const void* address, unsigned long bytes) {
  heed();
  __tsan_read_range(const_cast<void*>(address), bytes);
  ignore();
}
inline void writes(void* address, unsigned long bytes) {
  heed();
  __tsan_write_range(address, bytes);
  ignore();
}
#else
inline void* current_context() {
  return nullptr;
}
inline void* create_context() {
  return nullptr;
}
inline void enter(void*) {}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void ignore() {}
inline void heed() {}
inline void reads(const void*, unsigned long) {}
inline void writes(void*, unsigned long) {}
#endif

// Inside a primitive: the machine's own memory is none of the race check's business. May nest.
class Quiet {
 public:
#ifdef SPLITKERN_RACE_CHECK
  Quiet() {
    if (current_thread().quiet++ == 0) ignore();
  }
  ~Quiet() {
    if (--current->quiet == 0) heed();
  }
#else
  Quiet() {}  // not trivial, so that a Quiet counts as used
#endif
};

// Of the launch under way: the caller's context, and what the caller waits for.
void* launching_context();
const void* end_of_launch();

// Work of the hardware's own: a context that is nobody's.
class Engine {
 public:
#ifdef SPLITKERN_RACE_CHECK
  Engine() : before_(current_context()) {
    // A new context comes after whatever its creator did, which is nothing here. As new ones are dear, they serve
    // again.
    enter(launching_context());
    static thread_local void* contexts[32] = {};
    static thread_local unsigned next = 0;
    void*& own = contexts[next++ % 32];
    if (own == nullptr) own = create_context();
    enter(own);
    ignore();
  }
  ~Engine() {
    release(end_of_launch());
    heed();
    enter(before_);
  }

 private:
  void* before_;
#else
  Engine() {}
#endif
};

}  // namespace splitkern::host::race

#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FASTCNN_ASAN(call) call
#else
#define FASTCNN_ASAN(call)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FASTCNN_TSAN(call) call
#define FASTCNN_UNSEEN __attribute__((no_sanitize("thread")))  // the emulator's own state is not a thread's
#else
#define FASTCNN_TSAN(call)
#define FASTCNN_UNSEEN
#endif

float __half2float(__half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  if (exponent == 0) return (sign ? -1 : 1) * std::ldexp(static_cast<float>(mantissa), -24);
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

__half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (std::isnan(f)) return {0x7fff};
  if (a >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(a, &exponent);
  const int shift = std::max(exponent, -13) - 11;  // of the last bit that is kept
  const uint32_t kept = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, -shift)));
  return {static_cast<uint16_t>(sign | (a == 0 ? 0 : kept + ((shift + 24) << 10)))};
}

float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

__nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (std::isnan(f)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace simt {

uint3 thread_index, block_index;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStack = 256 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Fiber {
  enum State { ready, at_block_barrier, at_warp_barrier, done };
  State state = done;
  uint3 index;
  int id;
  unsigned mask;  // of the lanes it waits for
  Location where;
  ucontext_t context;
  void* stack;
  void *fake_stack = nullptr, *tsan = nullptr;
  std::exception_ptr error;
  alignas(16) unsigned char slots[2][256];  // what the lane shows to others, by turns: one is read while one is written
  int turn = 0, shown = 0;
  std::deque<std::vector<Copy>> copies;

  Fiber() : stack(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (stack == MAP_FAILED) throw std::bad_alloc();
    FASTCNN_TSAN(tsan = __tsan_create_fiber(0));
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    FASTCNN_TSAN(__tsan_destroy_fiber(tsan));
    munmap(stack, kStack);
  }
};

std::vector<std::unique_ptr<Fiber>> fibers;  // made once, used by every block
Fiber* current;
ucontext_t scheduler;
[[maybe_unused]] void *scheduler_tsan, *scheduler_fake_stack;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_size;
const std::function<void()>* body;
std::unique_ptr<unsigned char[]> shared;
// Addresses on which ThreadSanitizer hangs the order that a block's begin, end and barriers make.
char block_begin, block_end, block_barrier, warp_barriers[kWarp];

FASTCNN_UNSEEN void enter(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  FASTCNN_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStack));
  FASTCNN_TSAN(__tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync));
  swapcontext(&scheduler, &fiber.context);
  FASTCNN_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr));
}

FASTCNN_UNSEEN void leave(Fiber& fiber) {
  FASTCNN_ASAN(__sanitizer_start_switch_fiber(fiber.state == Fiber::done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                              scheduler_stack_size));
  FASTCNN_TSAN(__tsan_release(&block_end));  // it may have been the last that is heard of this fiber
  FASTCNN_TSAN(__tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync));
  swapcontext(&fiber.context, &scheduler);
  FASTCNN_ASAN(__sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size));
}

FASTCNN_UNSEEN void begin() {
  FASTCNN_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size));
  Fiber& fiber = *current;
  FASTCNN_TSAN(__tsan_acquire(&block_begin));
  try {
    (*body)();
  } catch (...) {
    fiber.error = std::current_exception();
  }
  fiber.state = Fiber::done;
  leave(fiber);
}

FASTCNN_UNSEEN void wait(Fiber::State state, unsigned mask, Location where, [[maybe_unused]] char* order) {
  Fiber& fiber = *current;
  fiber.state = state;
  fiber.mask = mask;
  fiber.where = where;
  FASTCNN_TSAN(__tsan_release(order));
  leave(fiber);
  FASTCNN_TSAN(__tsan_acquire(order));
}

std::string text(const Fiber& fiber) {
  const auto& t = fiber.index;
  std::string s = "thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " + std::to_string(t.z) + ") ";
  if (fiber.state == Fiber::done) return s + "has ended";
  const std::string file = fiber.where.file_name();
  return s + "waits at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(fiber.where.line());
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.mask == b.mask && a.where.line() == b.where.line() &&
         a.where.column() == b.where.column() && !std::strcmp(a.where.file_name(), b.where.file_name());
}

// Threads that wait will never run again.
void abandon() {
  FASTCNN_TSAN(__tsan_acquire(&block_end));
  fibers.clear();
}

[[noreturn]] void diverged(const Fiber& a, const Fiber& b) {
  const auto [x, y, z] = block_index;
  const std::string block = std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z);
  const std::string where = "in block (" + block + ") " + text(a) + ", " + text(b);
  abandon();
  throw std::runtime_error("a barrier that not all threads reach: " + where);
}

// All that a warp's waiting lanes wait for has come: let them go.
FASTCNN_UNSEEN bool release_warp(int first, int threads) {
  bool any = false;
  for (int i = first; i < std::min(first + kWarp, threads); ++i) {
    Fiber& fiber = *fibers[i];
    if (fiber.state != Fiber::at_warp_barrier) continue;
    bool all = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      if (first + lane >= threads || !same_place(fiber, *fibers[first + lane])) all = false;
    }
    if (!all) continue;
    const unsigned mask = fiber.mask;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      fibers[first + lane]->state = Fiber::ready;
      fibers[first + lane]->shown = fibers[first + lane]->turn;
    }
    any = true;
  }
  return any;
}

FASTCNN_UNSEEN void prepare(Fiber& fiber, unsigned id) {
  fiber.state = Fiber::ready;
  fiber.id = static_cast<int>(id);
  fiber.index = {id % block_dim.x, id / block_dim.x % block_dim.y, id / block_dim.x / block_dim.y};
  fiber.error = nullptr;
  fiber.copies.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin, 0);
}

FASTCNN_UNSEEN void run_block(int threads) {
  for (int i = 0; i < threads; ++i) prepare(*fibers[i], i);
  FASTCNN_TSAN(__tsan_release(&block_begin));
  for (;;) {
    bool progress = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i]->state != Fiber::ready) continue;
      enter(*fibers[i]);
      progress = true;
      if (fibers[i]->error) {
        const auto error = fibers[i]->error;
        abandon();
        std::rethrow_exception(error);
      }
    }
    for (int first = 0; first < threads; first += kWarp) progress |= release_warp(first, threads);
    if (progress) continue;
    const Fiber& one = *fibers[0];
    for (int i = 1; i < threads; ++i) {
      if (!(one.state == Fiber::done && fibers[i]->state == Fiber::done) && !same_place(one, *fibers[i])) {
        diverged(one, *fibers[i]);
      }
    }
    if (one.state == Fiber::done) break;
    if (one.state == Fiber::at_warp_barrier) diverged(one, one);  // its mask names lanes the block does not have
    for (int i = 0; i < threads; ++i) fibers[i]->state = Fiber::ready;
  }
  FASTCNN_TSAN(__tsan_acquire(&block_end));
}

// The limits of an H100, but for kMostInY.
void check_launch(const std::string& name, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
    return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;  // 0 - 1 is not
  };
  const char* wrong = nullptr;
  if (!within(grid, (1u << 31) - 1, kMostInY, 65535)) wrong = "grid";
  if (!within(block, 1024, 1024, 64) || block.x * block.y * block.z > 1024) wrong = "block";
  if (shared_bytes > 227 << 10) wrong = "shared memory";
  if (wrong) throw std::runtime_error(name + ": invalid configuration: the " + wrong);
}

}  // namespace

FASTCNN_UNSEEN void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                        const std::function<void()>& kernel) {
  check_launch(name, grid, block, shared_bytes);
  const int threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  FASTCNN_TSAN(scheduler_tsan = __tsan_get_current_fiber());
  body = &kernel;
  grid_dim = grid;
  block_dim = block;
  // From the last block to the first: nothing may depend on their order.
  for (unsigned z = grid.z; z-- > 0;) {
    for (unsigned y = grid.y; y-- > 0;) {
      for (unsigned x = grid.x; x-- > 0;) {
        block_index = {x, y, z};
        shared.reset(new unsigned char[shared_bytes]);
        std::memset(shared.get(), 0xff, shared_bytes);  // NaN
        run_block(threads);
      }
    }
  }
}

void* dynamic_shared() { return shared.get(); }

FASTCNN_UNSEEN int lane_id() { return current->id % kWarp; }

void sync_block(Location where) { wait(Fiber::at_block_barrier, 0, where, &block_barrier); }

FASTCNN_UNSEEN void sync_warp(unsigned mask, Location where) {
  if (!(mask >> lane_id() & 1)) throw std::runtime_error("a lane waits for others that do not wait for it");
  wait(Fiber::at_warp_barrier, mask, where, &warp_barriers[current->id / kWarp]);
}

FASTCNN_UNSEEN void exchange(unsigned mask, const void* value, size_t size, Location where) {
  Fiber& fiber = *current;
  if (size > sizeof fiber.slots[0]) throw std::runtime_error("too much to exchange");
  fiber.turn ^= 1;
  std::memcpy(fiber.slots[fiber.turn], value, size);
  sync_warp(mask, where);
}

FASTCNN_UNSEEN const void* lane(int i) {
  const Fiber& other = *fibers[current->id / kWarp * kWarp + i];
  return other.slots[other.shown];
}

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  Fiber& fiber = *current;
  if (fiber.copies.empty()) fiber.copies.emplace_back();
  fiber.copies.back().push_back({to, from, bytes, zeros});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_for_copies(size_t groups_left) {
  auto& copies = current->copies;
  // The last group is still open.
  while (copies.size() > groups_left + 1) {
    for (const Copy& copy : copies.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
    }
    copies.pop_front();
  }
}

}  // namespace simt

#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "actors.h"
#include "memory.h"
#include "records.h"

namespace emulated {
namespace {

using c10::DeviceIndex;
using c10::DispatchKey;
using c10::Stream;

const c10::Device DEVICE(at::kCUDA, 0);

// ------------------------------------------------------------------------------------------------ random numbers

// A stream of random numbers of its own, drawn as on the CPU.
class Generator final : public c10::GeneratorImpl {
 public:
  Generator() : c10::GeneratorImpl(DEVICE, c10::DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->set_state(*get_state());
    return copy;
  }

  at::Generator inner = at::detail::createCPUGenerator(c10::default_rng_seed_val);
};

// ------------------------------------------------------------------------------------------------ waiting

void wait_for_device() {
  Lock lock(mutex());
  for (Actor stream = 0; stream < num_streams(); stream++) learn(clock_of(stream));
  record_wait("the whole device");
}

struct Event {
  Clock clock;
};

// ------------------------------------------------------------------------------------------------ hooks

class Hooks final : public at::CUDAHooksInterface {
 public:
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  // Python asks for its `default_generators` first: the first generator must be the one that operators draw from.
  at::Generator getNewGenerator(DeviceIndex) const override {
    static bool is_first = true;
    return std::exchange(is_first, false) ? default_generator() : at::make_generator<Generator>();
  }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  int getNumGPUs() const override { return 1; }
  std::string showConfig() const override { return "an emulated device"; }
  void deviceSynchronize(DeviceIndex) const override {
    wait_for_device();
    deliver();
  }
};

// ------------------------------------------------------------------------------------------------ streams and events

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return at::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }

  Stream getStream(c10::Device) const override { return stream(current_stream()); }
  Stream getDefaultStream(c10::Device) const override { return stream(0); }
  Stream getNewStream(c10::Device, int) const override { return stream(new_stream()); }
  Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(new_stream()); }
  Stream exchangeStream(Stream next) const override {
    auto former = current_stream();
    set_current_stream(next.id());
    return stream(former);
  }
  bool queryStream(const Stream& asked) const override {
    learn_now(clock_of(asked.id()));
    return true;
  }
  void synchronizeStream(const Stream& awaited) const override {
    {
      Lock lock(mutex());
      learn(clock_of(awaited.id()));
      record_wait(awaited.id() ? "a stream" : "the default stream");
    }
    deliver();
  }

  void record(void** handle, const Stream& recording, const DeviceIndex, const c10::EventFlag) const override {
    Lock lock(mutex());
    if (!*handle) *handle = new Event();
    Clock& clock = clock_of(recording.id());
    clock.join(clock_of(this_thread()));
    static_cast<Event*>(*handle)->clock = clock;
    counts()["event recorded"]++;
  }
  void block(void* handle, const Stream& waiting) const override {
    Lock lock(mutex());
    if (!handle) return;
    clock_of(waiting.id()).join(static_cast<Event*>(handle)->clock);
    counts()["event awaited by a stream"]++;
  }
  bool queryEvent(void* handle) const override {
    if (handle) learn_now(static_cast<Event*>(handle)->clock);
    return true;
  }
  void synchronizeEvent(void* handle) const override {
    if (!handle) return;
    {
      Lock lock(mutex());
      learn(static_cast<Event*>(handle)->clock);
      record_wait("an event");
    }
    deliver();
  }
  void destroyEvent(void* handle, const DeviceIndex) const noexcept override { delete static_cast<Event*>(handle); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }

  void synchronizeDevice(const DeviceIndex) const override {
    wait_for_device();
    deliver();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& user) const override {
    device_allocator()->recordStream(data, user);
  }

 private:
  static Stream stream(int64_t id) { return Stream(Stream::UNSAFE, DEVICE, id); }
  static void learn_now(const Clock& clock) {
    Lock lock(mutex());
    learn(clock);
  }
};

// ------------------------------------------------------------------------------------------------ under CUDA's name

c10::impl::DeviceGuardImplRegistrar guard_of_device(at::kCUDA, new Guard());

c10::Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs> hooks_of_device(
    "CUDAHooks", at::CUDAHooksRegistry(),
    [](at::CUDAHooksArgs arguments) -> std::unique_ptr<at::CUDAHooksInterface> {
      return std::make_unique<Hooks>(arguments);
    });

constexpr uint8_t OVER_ALL_OTHERS = 255;

struct Allocators {
  Allocators() {
    c10::SetAllocator(at::kCUDA, device_allocator(), OVER_ALL_OTHERS);
    at::setHostAllocator(at::kCUDA, pinned_allocator(), OVER_ALL_OTHERS);
  }
} allocators_of_device;

}  // namespace

const at::Generator& default_generator() {
  static auto* one = new at::Generator(at::make_generator<Generator>());
  return *one;
}

at::Generator& cpu_generator_of(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

}  // namespace emulated

// A pretend CUDA device for a CPU build of torch.
//
// Tensors on it have CUDA's dispatch key, device guard, autograd thread, generator and allocator statistics; their bytes
// lie in the host's memory and every operation is done by the CPU's kernel. What torch does in Python and C++ above the
// kernels is therefore what it does on a GPU: which device a tensor is on, what may be mixed, what is copied, when the
// host waits. What lies below is not modelled: there are no streams, no overlap, no timing, no CUDA kernels.
//
// Two habits of memory make mistakes visible: new and freed memory is filled with 0xFF, which is NaN in every floating
// format, and an allocation beyond the limit raises torch's OutOfMemoryError.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;

namespace pretend {

const Device kDevice(DeviceType::CUDA, 0);
constexpr int64_t kGranularity = 512;  // bytes, of CUDA's caching allocator

// -- counts and events -----------------------------------------------------------------------------------------------

std::atomic<int64_t> num_syncs{0}, num_uploads{0}, num_downloads{0}, num_operations{0}, uploaded_bytes{0};
std::atomic<int64_t> live_bytes{0}, peak_bytes{0}, limit_bytes{INT64_MAX};
bool poisons = true;

using Listener = void (*)(const char*);
Listener listener = nullptr;

void tell(const std::string& what) {
  if (listener) listener(what.c_str());
}

// The host waits until the device has done everything that is queued.
void sync(const std::string& what) {
  num_syncs++;
  tell("sync " + what);
}

// -- memory ----------------------------------------------------------------------------------------------------------

int64_t rounded(int64_t size) { return (size + kGranularity - 1) / kGranularity * kGranularity; }

// Returns what is in use now. Negative sizes give back.
int64_t add_live(int64_t size) {
  const int64_t now = live_bytes.fetch_add(size) + size;
  int64_t peak = peak_bytes.load();
  while (now > peak && now <= limit_bytes.load() && !peak_bytes.compare_exchange_weak(peak, now)) {
  }
  return now;
}

void account(int64_t size) {
  const int64_t now = add_live(size);
  if (now <= limit_bytes.load()) return;
  live_bytes.fetch_sub(size);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. (pretend device) Tried to allocate ", size, " bytes; ", now - size,
                   " are in use");
}

struct Block {
  void* data;
  int64_t size;
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (!size) return {nullptr, nullptr, [](void*) {}, kDevice};
    const int64_t whole = rounded(size);
    account(whole);
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, kGranularity, whole) == 0, "the host's memory is full");
    if (poisons) memset(data, 0xFF, whole);
    return {data, new Block{data, whole}, &release, kDevice};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    if (poisons) memset(block->data, 0xFF, block->size);
    free(block->data);
    live_bytes.fetch_sub(block->size);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const override { memcpy(to, from, size); }
};
DeviceAllocator device_allocator;

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned_ranges;

void pin(const void* data, size_t size) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned_ranges[reinterpret_cast<uintptr_t>(data)] = size;
}

void unpin(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned_ranges.erase(reinterpret_cast<uintptr_t>(data));
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  const auto address = reinterpret_cast<uintptr_t>(data);
  auto range = pinned_ranges.upper_bound(address);
  if (range == pinned_ranges.begin()) return false;
  --range;
  return address < range->first + range->second;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = nullptr;
    const size_t whole = size ? size : 1;
    TORCH_CHECK(posix_memalign(&data, 4096, whole) == 0, "the host's memory is full");
    pin(data, whole);
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data) {
    unpin(data);
    free(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { memcpy(to, from, size); }
};
PinnedAllocator pinned_allocator;

// -- one memory under two dispatch keys ------------------------------------------------------------------------------

Tensor like(c10::Storage storage, DispatchKey key, const Tensor& model) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), model.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(model.sizes(), model.strides(), model.storage_offset());
  if (model.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (model.is_conj()) tensor._set_conj(true);
  if (model.is_neg()) tensor._set_neg(true);
  return tensor;
}

// What an alias keeps alive, and what it counts for.
struct Held {
  c10::Storage storage;
  int64_t size;
};

c10::Storage as_cpu(const c10::Storage& storage) {
  auto release = [](void* context) { delete static_cast<Held*>(context); };
  c10::DataPtr data(storage.mutable_data(), new Held{storage, 0}, release, Device(DeviceType::CPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
}

c10::DataPtr as_device_data(const c10::Storage& storage) {
  const int64_t size = rounded(storage.nbytes());
  account(size);
  auto release = [](void* context) {
    auto* held = static_cast<Held*>(context);
    live_bytes.fetch_sub(held->size);
    delete held;
  };
  return c10::DataPtr(storage.mutable_data(), new Held{storage, size}, release, kDevice);
}

c10::Storage as_device(const c10::Storage& storage) {
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), as_device_data(storage), &device_allocator, true);
}

// The CPU aliases of the arguments of one operation. Tensors and storages keep their identity both ways, so that
// in-place results and views come back as what they were.
class Aliases {
 public:
  Tensor to_cpu(const Tensor& tensor) {
    const auto known = tensors_.find(tensor.unsafeGetTensorImpl());
    if (known != tensors_.end()) return known->second.first;
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    auto storage = storages_.find(impl);
    if (storage == storages_.end()) {
      storage = storages_.emplace(impl, std::make_pair(as_cpu(tensor.storage()), tensor.storage())).first;
    }
    Tensor alias = like(storage->second.first, DispatchKey::CPU, tensor);
    tensors_.emplace(tensor.unsafeGetTensorImpl(), std::make_pair(alias, tensor));
    return alias;
  }

  Tensor to_device(const Tensor& tensor) const {
    for (const auto& [_, pair] : tensors_) {
      if (pair.first.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) return pair.second;
    }
    for (const auto& [_, pair] : storages_) {
      if (pair.first.unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) {
        return like(pair.second, DispatchKey::CUDA, tensor);
      }
    }
    return like(as_device(tensor.storage()), DispatchKey::CUDA, tensor);
  }

  // An operation may have resized its `out` arguments.
  void write_back() {
    for (auto& [_, pair] : storages_) {
      auto& [cpu, device] = pair;
      if (cpu.data() != device.data() || cpu.nbytes() != device.nbytes()) {
        device.set_data_ptr_noswap(as_device_data(cpu));
        device.set_nbytes(cpu.nbytes());
      }
    }
    for (auto& [_, pair] : tensors_) {
      const auto& [cpu, device] = pair;
      if (cpu.sizes() != device.sizes() || cpu.strides() != device.strides() || cpu.storage_offset() != device.storage_offset()) {
        device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
    }
  }

 private:
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> storages_;  // device -> (cpu, device)
  std::unordered_map<c10::TensorImpl*, std::pair<Tensor, Tensor>> tensors_;                // device -> (cpu, device)
};

// Kernels run below Python's dispatch modes, as CUDA's do.
struct BelowPython {
  c10::impl::ExcludeDispatchKeyGuard guard{DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot})};
};

// -- generator -------------------------------------------------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  Generator() : c10::GeneratorImpl(kDevice, DispatchKeySet(DispatchKey::CUDA)), inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->inner = inner.clone();
    return copy;
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

// -- every operation that has no kernel below ------------------------------------------------------------------------

// On CUDA the size of their result, or their result itself, is known on the host only after a wait.
const std::set<std::string> kWaits = {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_consecutive",
                                      "aten::unique_dim", "aten::is_nonzero", "aten::repeat_interleave.Tensor"};
// Products of matrices: in 16 bits the CPU's kernels are slow, and CUDA's add up in fp32.
const std::set<std::string> kProducts = {"aten::mm.out", "aten::addmm.out", "aten::bmm.out", "aten::baddbmm.out"};
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
                                         "aten::_unsafe_index", "aten::_unsafe_index_put"};

// One call: its arguments moved to the CPU, the rules about devices checked, its results moved back.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), schema_(op.schema()), name_(schema_.operator_name().name) {
    full_name_ = name_ + (schema_.overload_name().empty() ? "" : "." + schema_.overload_name());
  }

  void run(torch::jit::Stack* stack) {
    const size_t count = schema_.arguments().size(), begin = stack->size() - count;
    for (size_t i = 0; i < count; i++) (*stack)[begin + i] = argument(std::move((*stack)[begin + i]), schema_.arguments()[i]);
    TORCH_CHECK(!(on_device_ && !cpu_argument_.empty()),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (argument ", cpu_argument_,
                " of ", full_name_, ")");
    TORCH_CHECK(cpu_argument_.empty(), "a CUDA kernel was called with CPU tensors only: ", full_name_);
    if (kWaits.count(full_name_) || kWaits.count(name_) || mask_index_) sync(full_name_);
    if (kProducts.count(full_name_) && at::isReducedFloatingType(stack->back().toTensor().scalar_type())) {
      multiply_in_fp32(stack, begin);
    } else {
      op_.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    }
    aliases_.write_back();
    const size_t returns = schema_.returns().size(), first = stack->size() - returns;
    for (size_t i = 0; i < returns; i++) (*stack)[first + i] = result((*stack)[first + i]);
  }

 private:
  c10::IValue argument(c10::IValue value, const c10::Argument& argument) {
    const std::string& name = argument.name();
    if (value.isTensor()) return tensor(value.toTensor(), name, false);
    if (value.isTensorList()) {
      c10::List<Tensor> moved;
      for (const auto& each : value.toTensorVector()) moved.push_back(tensor(each, name, false));
      return moved;
    }
    if (value.isOptionalTensorList()) return optional_tensors(value, name, kIndexing.count(name_) && name == "indices");
    if (value.isDevice() && value.toDevice().is_cuda()) {
      on_device_ = true;
      return Device(DeviceType::CPU);
    }
    if (value.isGenerator()) return generator(value.toGenerator());
    return value;
  }

  // Like CUDA's kernels, takes a tensor of no dimensions from the CPU as a number.
  Tensor tensor(const Tensor& given, const std::string& name, bool may_be_on_cpu) {
    if (!given.defined()) return given;
    if (given.is_cuda()) {
      on_device_ = true;
      return aliases_.to_cpu(given);
    }
    if (given.is_cpu() && given.dim() > 0) {
      if (may_be_on_cpu) {
        sync(full_name_ + " (index on the CPU)");
      } else {
        cpu_argument_ = name;
      }
    }
    return given;
  }

  c10::IValue optional_tensors(const c10::IValue& value, const std::string& name, bool index) {
    c10::List<std::optional<Tensor>> moved;
    for (const auto& each : value.toListRef()) {
      if (each.isNone()) {
        moved.push_back(std::nullopt);
        continue;
      }
      const auto& given = each.toTensor();
      if (index && given.defined() && (given.scalar_type() == at::kBool || given.scalar_type() == at::kByte)) mask_index_ = true;
      moved.push_back(tensor(given, name, index));
    }
    return moved;
  }

  c10::IValue generator(const at::Generator& given) const {
    if (!given.defined()) return given;
    TORCH_CHECK(given.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", given.device(), "' (", full_name_, ")");
    return static_cast<Generator*>(given.unsafeGetGeneratorImpl())->inner;
  }

  // The last argument is `out`.
  void multiply_in_fp32(torch::jit::Stack* stack, size_t begin) const {
    Tensor out = stack->back().toTensor();
    for (size_t i = begin; i < stack->size(); i++) {
      if ((*stack)[i].isTensor()) (*stack)[i] = (*stack)[i].toTensor().to(at::kFloat);
    }
    op_.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    out.copy_(stack->back().toTensor());
    stack->back() = out;
  }

  c10::IValue result(const c10::IValue& value) const {
    if (value.isTensor() && value.toTensor().defined()) return aliases_.to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> moved;
    for (const auto& each : value.toTensorVector()) moved.push_back(each.defined() ? aliases_.to_device(each) : each);
    return moved;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  std::string full_name_, cpu_argument_;
  bool on_device_ = false, mask_index_ = false;
  Aliases aliases_;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  num_operations++;
  BelowPython below;
  Call(op).run(stack);
}

// -- operations that CUDA has kernels of its own for -----------------------------------------------------------------

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK(!device || device->index() <= 0, "CUDA error: invalid device ordinal");
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator, DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_allocator,
                                           DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage_offset(Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, at::Storage storage) { return at::native::set_(self, std::move(storage)); }

Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

Tensor& set_empty(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, device_allocator.allocate(0), &device_allocator, true);
  return self.set_(storage, 0, {0}, {});
}

// A copy without `non_blocking` waits for the device both ways. With it, a copy to the device does not, from pinned
// memory or not; a copy from the device does unless it goes to pinned memory.
Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  BelowPython below;
  TORCH_CHECK((to.is_cuda() || to.is_cpu()) && (from.is_cuda() || from.is_cpu() || from.is_meta()), "copy between ", to.device(), " and ",
              from.device());
  if (to.is_cuda() && !from.is_cuda()) {
    num_uploads++;
    uploaded_bytes += from.numel() * from.element_size();
    tell(is_pinned(from.const_data_ptr()) ? "upload from pinned memory" : "upload");
    if (!non_blocking) sync("upload");
  } else if (!to.is_cuda() && from.is_cuda()) {
    num_downloads++;
    tell("download");
    if (!(non_blocking && is_pinned(to.const_data_ptr()))) sync("download");
  }
  Aliases aliases;
  Tensor target = to.is_cuda() ? aliases.to_cpu(to) : to;
  const Tensor source = from.is_cuda() ? aliases.to_cpu(from) : from;
  at::AutoDispatchBelowADInplaceOrView guard;
  target.copy_(source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  Tensor target = to;
  target.resize_(from.sizes());
  return copy_(target, from, false);
}

c10::Scalar local_scalar_dense(const Tensor& self) {
  sync("item");
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView guard;
  return at::_local_scalar_dense(aliases.to_cpu(self));
}

void record_stream(Tensor&, at::Stream) {}

Tensor cudnn_convolution(const Tensor& input, const Tensor& weight, c10::SymIntArrayRef padding, c10::SymIntArrayRef stride,
                         c10::SymIntArrayRef dilation, c10::SymInt groups, bool, bool, bool) {
  BelowPython below;
  TORCH_CHECK(input.is_cuda() && weight.is_cuda(),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (cudnn_convolution)");
  num_operations++;
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView guard;
  const std::vector<int64_t> no_output_padding(padding.size(), 0);
  return aliases.to_device(at::convolution(aliases.to_cpu(input), aliases.to_cpu(weight), {}, C10_AS_INTARRAYREF_SLOW(stride),
                                           C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), false, no_output_padding,
                                           groups.guard_int(__FILE__, __LINE__)));
}

// Attention written out: the fused kernels are CUDA's.
int64_t fused_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

// -- device guard ----------------------------------------------------------------------------------------------------

thread_local int64_t current_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::UNSAFE, kDevice, current_stream); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::UNSAFE, kDevice, 0); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override {
    static std::atomic<int64_t> next{1};
    return c10::Stream(c10::Stream::UNSAFE, kDevice, next++);
  }
  c10::Stream getNewStream(Device device, int) const override { return getStreamFromGlobalPool(device, false); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(kDevice);
    current_stream = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { sync("synchronizeStream"); }
  void synchronizeEvent(void*) const override { sync("synchronizeEvent"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { sync("synchronizeDevice"); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};

// -- what torch asks of CUDA -----------------------------------------------------------------------------------------

constexpr long kCudnn = 91900, kRuntime = 12080;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return kCudnn; }
  long versionRuntimeCuDNN() const override { return kCudnn; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return at::make_generator<Generator>(); }
  void deviceSynchronize(at::DeviceIndex) const override { sync("deviceSynchronize"); }
};

std::unique_ptr<at::CUDAHooksInterface> new_hooks(at::CUDAHooksArgs arguments) { return std::make_unique<Hooks>(arguments); }

struct Registration {
  Registration() {
    at::CUDAHooksRegistry()->Register("CUDAHooks", &new_hooks);
    c10::SetAllocator(DeviceType::CUDA, &device_allocator, 255);
  }
} registration;

Tensor from_address(int64_t address, int64_t size) {
  c10::DataPtr data(reinterpret_cast<void*>(address), nullptr, [](void*) {}, kDevice);
  c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(data), &device_allocator, false);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CUDA),
                                                         caffe2::TypeMeta::Make<uint8_t>());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({size});
  return tensor;
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace pretend

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&pretend::fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &pretend::empty);
  m.impl("empty_strided", &pretend::empty_strided);
  m.impl("as_strided", &pretend::as_strided);
  m.impl("view", &pretend::view);
  m.impl("_reshape_alias", &pretend::reshape_alias);
  m.impl("resize_", &pretend::resize_);
  m.impl("set_.source_Storage_storage_offset", &pretend::set_storage_offset);
  m.impl("set_.source_Storage", &pretend::set_storage);
  m.impl("set_.source_Tensor", &pretend::set_tensor);
  m.impl("set_", &pretend::set_empty);
  m.impl("copy_", &pretend::copy_);
  m.impl("_copy_from_and_resize", &pretend::copy_from_and_resize);
  m.impl("_local_scalar_dense", &pretend::local_scalar_dense);
  m.impl("record_stream", &pretend::record_stream);
  m.impl("_fused_sdp_choice", &pretend::fused_sdp_choice);
  m.impl("cudnn_convolution", &pretend::cudnn_convolution);
  // torch would otherwise take their composite forms, which CUDA has kernels in place of
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&pretend::fallback>());
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&pretend::fallback>());
  // and that of this one warns that it resizes its own output
  m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&pretend::fallback>());
}

TORCH_LIBRARY(pretend_cuda, m) { m.def("from_address(int address, int size) -> Tensor", &pretend::from_address); }

// -- for device.py ---------------------------------------------------------------------------------------------------

extern "C" {
int64_t pretend_count(int which) {
  const std::atomic<int64_t>* counts[] = {&pretend::num_syncs,      &pretend::num_uploads, &pretend::num_downloads, &pretend::num_operations,
                                          &pretend::uploaded_bytes, &pretend::live_bytes,  &pretend::peak_bytes,    &pretend::limit_bytes};
  return *counts[which];
}
void pretend_reset() {
  pretend::num_syncs = pretend::num_uploads = pretend::num_downloads = pretend::num_operations = pretend::uploaded_bytes = 0;
  pretend::peak_bytes = pretend::live_bytes.load();
}
void pretend_listen(pretend::Listener listener) { pretend::listener = listener; }
void pretend_limit(int64_t size) { pretend::limit_bytes = size; }
void pretend_sync(const char* what) { pretend::sync(what); }
void pretend_add_live(int64_t size) { pretend::add_live(size); }
void pretend_pin(int64_t address, int64_t size) { pretend::pin(reinterpret_cast<void*>(address), size); }
void pretend_unpin(int64_t address) { pretend::unpin(reinterpret_cast<void*>(address)); }
}

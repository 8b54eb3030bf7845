// The torch boundary: defines the operators and converts tensors to plain pointers. Python
// (models/detrs/ops/native.py) registers fake kernels, gradients and autocast, and checks the arguments with
// readable messages; the checks here only prevent a direct call from reading out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "deform_attn.h"
#include "normalize.h"

#ifdef DETRS_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/deform_attn.h"
#endif

namespace detrs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Storage storage_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      STD_TORCH_CHECK(false, "value: expected float32, float64, bfloat16 or float16");
  }
}

ScalarType arithmetic_type(Storage storage) {
  return storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
}

// Makes a tensor contiguous. The CUDA kernels load 16 bytes at once, so there it must also start at a
// multiple of 16, which a slice need not do; a clone does.
Tensor pack(const Tensor& tensor) {
  Tensor packed = torch::stable::contiguous(tensor);
  bool aligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
  return packed.is_cuda() && !aligned ? torch::stable::clone(packed) : packed;
}

// Inputs of both forms. In the fused form there is a reference, `locations` are offsets and `weights` logits.
struct Inputs {
  Tensor value;
  std::vector<int64_t> shapes;
  Tensor locations, weights;
  std::optional<Tensor> reference;

  // Copies where needed; see pack.
  Inputs packed() const {
    std::optional<Tensor> packed_reference;
    if (reference) packed_reference = pack(*reference);
    return {pack(value), shapes, pack(locations), pack(weights), packed_reference};
  }
};

void check_levels(const Tensor& value, const std::vector<int64_t>& shapes) {
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "shapes: expected height and width of each level");
  int64_t num_tokens = 0;
  for (size_t level = 0; level < shapes.size(); level += 2) {
    STD_TORCH_CHECK(shapes[level] > 0 && shapes[level + 1] > 0, "a level without pixels");
    num_tokens += shapes[level] * shapes[level + 1];
  }
  STD_TORCH_CHECK(num_tokens == value.size(1), "shapes do not add up to value's tokens");
  STD_TORCH_CHECK(num_tokens < (int64_t(1) << 31), "2^31 tokens or more");
}

void check_devices(const Inputs& in) {
  auto is_elsewhere = [&](const Tensor& tensor) {
    return tensor.is_cuda() != in.value.is_cuda() || tensor.get_device_index() != in.value.get_device_index();
  };
  bool elsewhere = is_elsewhere(in.locations) || is_elsewhere(in.weights);
  STD_TORCH_CHECK(!elsewhere && !(in.reference && is_elsewhere(*in.reference)),
                  "tensors on different devices");
}

#ifdef DETRS_WITH_CUDA
void check_cuda_sizes(const Inputs& in) {
  const int64_t num_channels = in.value.size(3);
  STD_TORCH_CHECK(num_channels % 4 == 0 && num_channels <= 128,
                  "the CUDA kernels need a number of channels that is a multiple of 4, at most 128");
  STD_TORCH_CHECK(in.value.size(2) < (1 << 20), "2^20 heads or more");
  STD_TORCH_CHECK(in.locations.size(3) * in.locations.size(4) < (int64_t(1) << 31), "2^31 samples or more");
  STD_TORCH_CHECK(in.locations.size(3) <= cuda::kMaxLevels, "shapes: found ", in.locations.size(3),
                  " levels, expected at most ", cuda::kMaxLevels, " on CUDA");
}
#endif

// Throws unless all sizes are consistent: the kernels do not check them.
void check(const Inputs& in) {
  STD_TORCH_CHECK(in.value.dim() == 4 && in.locations.dim() == 6 && in.weights.dim() == 5,
                  "wrong number of dimensions");
  bool same = in.locations.size(0) == in.value.size(0) && in.locations.size(2) == in.value.size(2) &&
              in.locations.size(5) == 2 && int64_t(in.shapes.size()) == 2 * in.locations.size(3);
  for (int i = 0; i < 5; i++) same = same && in.locations.size(i) == in.weights.size(i);
  STD_TORCH_CHECK(same, "value, shapes, locations and weights disagree");
  check_levels(in.value, in.shapes);
  check_devices(in);
#ifdef DETRS_WITH_CUDA
  if (in.value.is_cuda()) check_cuda_sizes(in);
#endif
  ScalarType expected = arithmetic_type(storage_of(in.value));
  STD_TORCH_CHECK(in.locations.scalar_type() == expected && in.weights.scalar_type() == expected,
                  "locations and weights must be float64 with a float64 value, else float32");
  if (!in.reference) return;
  const Tensor& reference = *in.reference;
  STD_TORCH_CHECK(reference.dim() == 4 && reference.size(0) == in.value.size(0) &&
                      reference.size(1) == in.locations.size(1) &&
                      reference.size(2) == in.locations.size(3) &&
                      (reference.size(3) == 2 || reference.size(3) == 4),
                  "reference: expected [images, queries, levels, 2 or 4]");
  STD_TORCH_CHECK(reference.scalar_type() == expected, "reference must have locations' dtype");
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Fills in the inputs of a Problem. They must be contiguous, and outlive it: it holds plain pointers.
template <class T>
Problem<T> problem_of(const Inputs& in) {
  Problem<T> problem{};
  problem.num_images = in.value.size(0), problem.num_tokens = in.value.size(1);
  problem.num_heads = in.value.size(2), problem.num_channels = in.value.size(3);
  problem.num_queries = in.locations.size(1), problem.num_levels = in.locations.size(3);
  problem.num_points = in.locations.size(4);
  problem.reference_size = in.reference ? in.reference->size(3) : 0;
  problem.shapes = in.shapes.data();
  problem.storage = storage_of(in.value);
  problem.value = in.value.const_data_ptr();
  problem.reference = in.reference ? data<T>(*in.reference) : nullptr;
  problem.locations = data<T>(in.locations);
  problem.weights = data<T>(in.weights);
  return problem;
}

#ifdef DETRS_WITH_CUDA
using StreamFunction = AOTITorchError (*)(int32_t, void**);

// Returns torch's function for its current CUDA stream, which is in libtorch_cuda. It is looked up at run
// time, because a library that is linked with libtorch_cuda cannot be loaded by a torch without CUDA.
// RTLD_NOLOAD: torch has loaded it already, since there are CUDA tensors.
StreamFunction find_stream_function() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(function != nullptr, "this version of torch does not export its current CUDA stream");
  return reinterpret_cast<StreamFunction>(function);
}

void* current_stream(int32_t device) {
  static const StreamFunction function = find_stream_function();  // looked up once
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Calls run(stream) on the device of the tensors.
template <class Run>
void on_cuda(const Inputs& in, const Run& run) {
  const int32_t device = in.value.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  run(current_stream(device));
}
#endif

template <class T>
void run_forward(const Inputs& in, const Tensor& out) {
  Problem<T> problem = problem_of<T>(in);
  problem.out = out.mutable_data_ptr();
#ifdef DETRS_WITH_CUDA
  if (in.value.is_cuda()) return on_cuda(in, [&](void* stream) { cuda::forward(problem, stream); });
#endif
  cpu::forward(problem);
}

// Returns whether there are no images, queries, heads, channels or samples: no kernel runs, and all results
// are zero.
bool is_empty(const Inputs& in) {
  return in.value.numel() == 0 || in.locations.numel() == 0;
}

Tensor forward(const Inputs& given) {
  check(given);
  const Inputs in = given.packed();
  const Tensor& value = in.value;
  const std::vector<int64_t> size = {value.size(0), in.locations.size(1), value.size(2) * value.size(3)};
  if (is_empty(in)) return torch::stable::new_zeros(value, size);
  Tensor out = torch::stable::new_empty(value, size);
  bool is_double = value.scalar_type() == ScalarType::Double;
  is_double ? run_forward<double>(in, out) : run_forward<float>(in, out);
  return out;
}

struct Gradients {
  Tensor value, locations, weights, reference;
};

template <class T>
void run_backward(const Tensor& grad_out, const Inputs& in, const Gradients& gradients) {
  Problem<T> problem = problem_of<T>(in);
  problem.grad_out = grad_out.const_data_ptr();
  problem.grad_value = gradients.value.mutable_data_ptr();
  problem.grad_locations = static_cast<T*>(gradients.locations.mutable_data_ptr());
  problem.grad_weights = static_cast<T*>(gradients.weights.mutable_data_ptr());
  bool wants_reference = gradients.reference.dim() == 5;
  problem.grad_reference =
      wants_reference ? static_cast<T*>(gradients.reference.mutable_data_ptr()) : nullptr;
#ifdef DETRS_WITH_CUDA
  if (in.value.is_cuda()) return on_cuda(in, [&](void* stream) { cuda::backward(problem, stream); });
#endif
  cpu::backward(problem);
}

Gradients backward(const Tensor& grad_out, const Inputs& given, bool reference_needs_grad) {
  check(given);
  STD_TORCH_CHECK(grad_out.scalar_type() == given.value.scalar_type() && grad_out.dim() == 3 &&
                      grad_out.is_cuda() == given.value.is_cuda() &&
                      grad_out.get_device_index() == given.value.get_device_index() &&
                      grad_out.size(0) == given.value.size(0) &&
                      grad_out.size(1) == given.locations.size(1) &&
                      grad_out.size(2) == given.value.size(2) * given.value.size(3),
                  "grad_out must have the shape, dtype and device of the output");
  const Inputs in = given.packed();
  const ScalarType storage = in.value.scalar_type();
  // On CUDA, many threads add to one number, which must not be rounded to half precision after each addition.
  const ScalarType value_grad_type = in.value.is_cuda() ? in.locations.scalar_type() : storage;
  std::vector<int64_t> by_head = {0};
  if (reference_needs_grad)
    by_head = {in.value.size(0), in.locations.size(1), in.value.size(2), in.locations.size(3),
               in.reference->size(3)};
  const bool empty = is_empty(in);
  auto new_gradient = [&](const Tensor& like) {
    return empty ? torch::stable::new_zeros(like, like.sizes())
                 : torch::stable::new_empty(like, like.sizes());
  };
  // The CUDA kernels add to grad_value, so it starts as zeros. The CPU code clears it itself, if it adds to
  // it directly.
  Gradients gradients{
      in.value.is_cuda() ? torch::stable::new_zeros(in.value, in.value.sizes(), value_grad_type)
                         : new_gradient(in.value),
      new_gradient(in.locations), new_gradient(in.weights), torch::stable::new_zeros(in.locations, by_head)};
  if (empty) {
    gradients.value = torch::stable::to(gradients.value, storage);
    return gradients;
  }
  const Tensor packed_grad = pack(grad_out);
  storage == ScalarType::Double ? run_backward<double>(packed_grad, in, gradients)
                                : run_backward<float>(packed_grad, in, gradients);
  if (value_grad_type != storage) gradients.value = torch::stable::to(gradients.value, storage);
  return gradients;
}

Tensor deform_attn(Tensor value, std::vector<int64_t> shapes, Tensor locations, Tensor weights) {
  return forward({value, shapes, locations, weights, std::nullopt});
}

std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(Tensor grad_out, Tensor value,
                                                        std::vector<int64_t> shapes, Tensor locations,
                                                        Tensor weights) {
  Gradients gradients = backward(grad_out, {value, shapes, locations, weights, std::nullopt}, false);
  return {gradients.value, gradients.locations, gradients.weights};
}

Tensor deform_attn_fused(Tensor value, std::vector<int64_t> shapes, Tensor reference, Tensor offsets,
                         Tensor logits) {
  return forward({value, shapes, offsets, logits, reference});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_attn_fused_backward(Tensor grad_out, Tensor value,
                                                                      std::vector<int64_t> shapes,
                                                                      Tensor reference, Tensor offsets,
                                                                      Tensor logits,
                                                                      bool reference_needs_grad) {
  Gradients gradients = backward(grad_out, {value, shapes, offsets, logits, reference}, reference_needs_grad);
  return {gradients.value, gradients.reference, gradients.locations, gradients.weights};
}

void check_images(const Tensor& pixels, const Tensor& sizes, const Tensor& mean, const Tensor& std) {
  STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Byte && pixels.dim() == 4 && pixels.size(3) == 3,
                  "pixels: expected uint8 [images, height, width, 3]");
  STD_TORCH_CHECK(sizes.scalar_type() == ScalarType::Long && sizes.dim() == 2 &&
                      sizes.size(0) == pixels.size(0) && sizes.size(1) == 2,
                  "sizes: expected int64 [images, 2]");
  for (const Tensor* factors : {&mean, &std})
    STD_TORCH_CHECK(
        factors->scalar_type() == ScalarType::Float && factors->dim() == 1 && factors->size(0) == 3,
        "mean and std: expected float32 [3]");
  const int64_t* size = data<int64_t>(sizes);
  for (int64_t i = 0; i < 2 * sizes.size(0); i++)
    STD_TORCH_CHECK(size[i] >= 0 && size[i] <= pixels.size(1 + i % 2), "sizes: an image larger than pixels");
}

// CPU only: on a GPU torch's own kernels are as fast as the memory.
Tensor normalize_images(Tensor pixels, Tensor sizes, Tensor mean, Tensor std) {
  pixels = pack(pixels), sizes = pack(sizes), mean = pack(mean), std = pack(std);
  check_images(pixels, sizes, mean, std);
  Tensor out = torch::stable::new_empty(pixels, pixels.sizes(), ScalarType::Float);
  cpu::normalize({pixels.size(0), pixels.size(1), pixels.size(2), data<uint8_t>(pixels), data<int64_t>(sizes),
                  data<float>(mean), data<float>(std), static_cast<float*>(out.mutable_data_ptr())});
  return out;
}

std::string instruction_set() {
  return cpu::instruction_set();
}

// The same functions serve CPU and CUDA: they branch on the device of the tensors.
template <class Library>
void implement(Library& library) {
  library.impl("deform_attn", TORCH_BOX(&deform_attn));
  library.impl("deform_attn_backward", TORCH_BOX(&deform_attn_backward));
  library.impl("deform_attn_fused", TORCH_BOX(&deform_attn_fused));
  library.impl("deform_attn_fused_backward", TORCH_BOX(&deform_attn_fused_backward));
}

// build.py defines the GPUs that the library has kernels for, such as "sm_80 sm_90 compute_90", or the reason
// why there are none.
std::string cuda_targets() {
#ifdef DETRS_WITH_CUDA
  return DETRS_WITH_CUDA;
#else
  return "";
#endif
}

std::string cuda_note() {
#ifdef DETRS_WITHOUT_CUDA
  return DETRS_WITHOUT_CUDA;
#else
  return "";
#endif
}

}  // namespace
}  // namespace detrs

STABLE_TORCH_LIBRARY(detrs, library) {
  library.def("deform_attn(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor");
  library.def(
      "deform_attn_backward(Tensor grad_out, Tensor value, SymInt[] shapes, Tensor locations, Tensor "
      "weights) "
      "-> (Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  library.def(
      "deform_attn_fused(Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets, Tensor logits) -> "
      "Tensor");
  // grad_reference is per head, [images, queries, heads, levels, 2 or 4], or empty if it is not needed.
  // Python sums over the heads.
  library.def(
      "deform_attn_fused_backward(Tensor grad_out, Tensor value, SymInt[] shapes, Tensor reference, Tensor "
      "offsets, "
      "Tensor logits, bool reference_needs_grad) "
      "-> (Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, Tensor grad_logits)");
  library.def("normalize_images(Tensor pixels, Tensor sizes, Tensor mean, Tensor std) -> Tensor");
  library.def("instruction_set() -> str");
  library.def("cuda_targets() -> str");
  library.def("cuda_note() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(detrs, CPU, library) {
  detrs::implement(library);
  library.impl("normalize_images", TORCH_BOX(&detrs::normalize_images));
}

#ifdef DETRS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(detrs, CUDA, library) {
  detrs::implement(library);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(detrs, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&detrs::instruction_set));
  library.impl("cuda_targets", TORCH_BOX(&detrs::cuda_targets));
  library.impl("cuda_note", TORCH_BOX(&detrs::cuda_note));
}

// The boundary: schemas, and tensors to plain pointers. Python (models/detrs/ops/native.py) checks the
// arguments for people and registers fake and autograd; the checks here only keep a direct call from reading
// out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>
#include <vector>

#include "deform_attn.h"

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

// Throws unless the kernels may trust the sizes.
void check(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations,
           const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                  "wrong number of dimensions");
  bool same = locations.size(0) == value.size(0) && locations.size(2) == value.size(2) &&
              locations.size(5) == 2 && int64_t(shapes.size()) == 2 * locations.size(3);
  for (int i = 0; i < 5; i++) same = same && locations.size(i) == weights.size(i);
  STD_TORCH_CHECK(same, "value, shapes, locations and weights disagree");
  int64_t num_tokens = 0;
  for (size_t level = 0; level + 1 < shapes.size(); level += 2) {
    STD_TORCH_CHECK(shapes[level] > 0 && shapes[level + 1] > 0, "a level without pixels");
    num_tokens += shapes[level] * shapes[level + 1];
  }
  STD_TORCH_CHECK(num_tokens == value.size(1), "shapes do not add up to value's tokens");
  STD_TORCH_CHECK(num_tokens < (int64_t(1) << 31), "more than 2^31 tokens");
  ScalarType expected = arithmetic_type(storage_of(value));
  STD_TORCH_CHECK(locations.scalar_type() == expected && weights.scalar_type() == expected,
                  "locations and weights must be float64 with a float64 value, else float32");
}

// The inputs' part of a Problem; the tensors must be contiguous and outlive it.
template <class T>
Problem<T> problem_of(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations,
                      const Tensor& weights) {
  Problem<T> problem{};
  problem.num_images = value.size(0), problem.num_tokens = value.size(1);
  problem.num_heads = value.size(2), problem.num_channels = value.size(3);
  problem.num_queries = locations.size(1), problem.num_levels = locations.size(3);
  problem.num_points = locations.size(4);
  problem.shapes = shapes.data();
  problem.storage = storage_of(value);
  problem.value = value.const_data_ptr();
  problem.locations = static_cast<const T*>(locations.const_data_ptr());
  problem.weights = static_cast<const T*>(weights.const_data_ptr());
  return problem;
}

template <class T>
void run_forward(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations,
                 const Tensor& weights, const Tensor& out) {
  Problem<T> problem = problem_of<T>(value, shapes, locations, weights);
  problem.out = out.mutable_data_ptr();
  cpu::forward(problem);
}

Tensor deform_attn(Tensor value, std::vector<int64_t> shapes, Tensor locations, Tensor weights) {
  check(value, shapes, locations, weights);
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = torch::stable::contiguous(weights);
  Tensor out =
      torch::stable::new_empty(value, {value.size(0), locations.size(1), value.size(2) * value.size(3)});
  if (value.scalar_type() == ScalarType::Double) {
    run_forward<double>(value, shapes, locations, weights, out);
  } else {
    run_forward<float>(value, shapes, locations, weights, out);
  }
  return out;
}

template <class T>
void run_backward(const Tensor& grad_out, const Tensor& value, const std::vector<int64_t>& shapes,
                  const Tensor& locations, const Tensor& weights, const Tensor& grad_value,
                  const Tensor& grad_locations, const Tensor& grad_weights) {
  Problem<T> problem = problem_of<T>(value, shapes, locations, weights);
  problem.grad_out = grad_out.const_data_ptr();
  problem.grad_value = grad_value.mutable_data_ptr();
  problem.grad_locations = static_cast<T*>(grad_locations.mutable_data_ptr());
  problem.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
  cpu::backward(problem);
}

std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(Tensor grad_out, Tensor value,
                                                        std::vector<int64_t> shapes, Tensor locations,
                                                        Tensor weights) {
  check(value, shapes, locations, weights);
  STD_TORCH_CHECK(grad_out.scalar_type() == value.scalar_type() && grad_out.dim() == 3 &&
                      grad_out.size(0) == value.size(0) && grad_out.size(1) == locations.size(1) &&
                      grad_out.size(2) == value.size(2) * value.size(3),
                  "grad_out must look like deform_attn's result");
  grad_out = torch::stable::contiguous(grad_out);
  value = torch::stable::contiguous(value);
  locations = torch::stable::contiguous(locations);
  weights = torch::stable::contiguous(weights);
  Tensor grad_value = torch::stable::new_zeros(value, value.sizes());
  Tensor grad_locations = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  if (value.scalar_type() == ScalarType::Double) {
    run_backward<double>(grad_out, value, shapes, locations, weights, grad_value, grad_locations,
                         grad_weights);
  } else {
    run_backward<float>(grad_out, value, shapes, locations, weights, grad_value, grad_locations,
                        grad_weights);
  }
  return {grad_value, grad_locations, grad_weights};
}

std::string instruction_set() {
  return cpu::instruction_set();
}

}  // namespace
}  // namespace detrs

STABLE_TORCH_LIBRARY(detrs, library) {
  library.def("deform_attn(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor");
  library.def(
      "deform_attn_backward(Tensor grad_out, Tensor value, int[] shapes, Tensor locations, Tensor weights) "
      "-> (Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(detrs, CPU, library) {
  library.impl("deform_attn", TORCH_BOX(&detrs::deform_attn));
  library.impl("deform_attn_backward", TORCH_BOX(&detrs::deform_attn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(detrs, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&detrs::instruction_set));
}

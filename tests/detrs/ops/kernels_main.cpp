// Runs every kernel on unusual sizes with extreme locations, in buffers that end exactly where the tensors
// end, so that the sanitizers detect each stray access. test_sanitizers.py compiles it, also with vectors
// wider than those of the machine.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace {

using detrs::Problem;
using detrs::Storage;
using detrs::cpu::HeadView;
using detrs::cpu::Kernels;

template <class T>
std::vector<T> numbers(int64_t count, T scale) {
  std::vector<T> result(count);
  for (int64_t i = 0; i < count; i++) result[i] = scale * T(std::sin(double(i) * 12.9898));
  return result;
}

struct Size {
  int64_t channels, points, reference_size;
};

// Runs one image and one head; returns a sum over the gradient, so that the compiler cannot remove the work.
template <class T>
double run(const Kernels<T>& kernels, Storage storage, int64_t bytes, const Size& size) {
  const std::vector<int64_t> shapes = {3, 5, 2, 1, 1, 1};
  const int64_t tokens = 18, queries = 9, samples = 3 * size.points;
  std::vector<char> value(tokens * size.channels * bytes, 0), out(queries * size.channels * bytes, 0);
  std::vector<char> grad_value(value.size(), 0);
  std::vector<T> locations = numbers<T>(queries * samples * 2, 1.5),
                 weights = numbers<T>(queries * samples, 1);
  const T extreme[] = {T(-1), T(0), T(1), T(2), T(1e30), T(INFINITY), T(-INFINITY), T(NAN)};
  for (size_t i = 0; i < locations.size(); i += 3) locations[i] = extreme[i / 3 % 8];
  std::vector<T> reference = numbers<T>(queries * 3 * size.reference_size, 1);
  std::vector<T> grad_locations(locations.size()), grad_weights(weights.size());
  std::vector<T> grad_reference(reference.size());

  Problem<T> problem{};
  problem.num_images = problem.num_heads = 1;
  problem.num_tokens = tokens, problem.num_channels = size.channels, problem.num_queries = queries;
  problem.num_levels = 3, problem.num_points = size.points, problem.reference_size = size.reference_size;
  problem.shapes = shapes.data(), problem.storage = storage;
  problem.value = value.data(), problem.out = out.data(), problem.grad_out = out.data();
  problem.grad_value = grad_value.data(), problem.reference = reference.data();
  problem.locations = locations.data(), problem.weights = weights.data();
  problem.grad_locations = grad_locations.data(), problem.grad_weights = grad_weights.data();
  problem.grad_reference = grad_reference.data();

  std::unique_ptr<T[], void (*)(void*)> scratch(
      static_cast<T*>(std::aligned_alloc(64, (kernels.scratch_size(problem) * sizeof(T) + 63) / 64 * 64)),
      std::free);
  std::vector<T> packed = numbers<T>(tokens * size.channels, 1), packed_grad(packed.size());
  kernels.unpack(problem, 0, 0, packed.data());
  kernels.pack(problem, 0, 0, packed.data());
  kernels.prepare_scratch(problem, scratch.get());
  const HeadView<T> in_place{value.data(), storage, size.channels, packed_grad.data(), size.channels};
  const Storage wide = sizeof(T) == 8 ? Storage::float64 : Storage::float32;
  const HeadView<T> copied{packed.data(), wide, size.channels, packed_grad.data(), size.channels};
  for (const auto& view : {in_place, copied}) {
    kernels.forward(problem, view, {0, 0, 0, queries}, scratch.get());
    kernels.backward(problem, view, {0, 0, 0, queries}, scratch.get());
  }
  double sum = 0;
  for (T number : packed_grad) sum += std::isfinite(number) ? number : 0;
  return sum;
}

}  // namespace

int main() {
  const auto& set = detrs::cpu::kernels_baseline;
  double sum = 0;
  for (int64_t channels : {1, 3, 4, 20, 32, 61, 132})
    for (int64_t points : {1, 4, 11, 23})
      for (int64_t reference_size : {0, 2, 4}) {
        const Size size{channels, points, reference_size};
        sum += run(set.float_, Storage::float32, 4, size) + run(set.double_, Storage::float64, 8, size);
        sum += run(set.float_, Storage::bfloat16, 2, size) + run(set.float_, Storage::float16, 2, size);
      }
  std::printf("finished %s\n", std::isfinite(sum) ? "finite" : "not finite");
}

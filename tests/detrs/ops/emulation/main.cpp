// Runs cases with the emulated kernels: `emulate CASES RESULTS [FAULT]`. tests/support/emulated.py writes
// CASES and reads RESULTS. Each tensor has a buffer that ends exactly where it ends, so that the sanitizers
// detect each stray access.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/deform_attn.cu"

namespace detrs::cuda {
namespace {
__align__(16) unsigned char shared_memory[1 << 15];
}  // namespace
}  // namespace detrs::cuda

namespace {

using detrs::Problem;
using detrs::Storage;

struct Header {
  int64_t storage, num_images, num_tokens, num_heads, num_channels, num_queries, num_levels, num_points;
  int64_t reference_size, wants_reference_grad,
      order;  // order: 0 ascending, 1 descending, else a random seed
};

std::vector<char> read(std::FILE* file, int64_t size) {
  std::vector<char> bytes(size);
  if (size != 0 && std::fread(bytes.data(), size, 1, file) != 1) std::abort();
  return bytes;
}

// Returns a buffer full of NaN, so that missing writes show.
std::vector<char> unwritten(int64_t size) {
  return std::vector<char>(size, char(0xff));
}

void write(std::FILE* file, const std::vector<char>& bytes) {
  if (!bytes.empty() && std::fwrite(bytes.data(), bytes.size(), 1, file) != 1) std::abort();
}

template <class T>
void run(const Header& header, std::FILE* cases, std::FILE* results) {
  Problem<T> problem{};
  problem.storage = static_cast<Storage>(header.storage);
  problem.num_images = header.num_images, problem.num_tokens = header.num_tokens;
  problem.num_heads = header.num_heads, problem.num_channels = header.num_channels;
  problem.num_queries = header.num_queries, problem.num_levels = header.num_levels;
  problem.num_points = header.num_points, problem.reference_size = header.reference_size;
  const int64_t bytes = header.storage == 0 ? 4 : header.storage == 1 ? 8 : 2;
  const int64_t rows = header.num_images * header.num_queries * header.num_heads;
  const int64_t samples = rows * problem.num_samples();
  const int64_t values = header.num_images * header.num_tokens * header.num_heads * header.num_channels;
  const int64_t references =
      header.num_queries * header.num_images * header.num_levels * header.reference_size;

  const std::vector<char> shapes = read(cases, 16 * header.num_levels), value = read(cases, values * bytes);
  const std::vector<char> reference = read(cases, references * sizeof(T));
  const std::vector<char> locations = read(cases, 2 * samples * sizeof(T));
  const std::vector<char> weights = read(cases, samples * sizeof(T));
  const std::vector<char> grad_out = read(cases, rows * header.num_channels * bytes);
  std::vector<char> out = unwritten(rows * header.num_channels * bytes), grad_value(values * sizeof(T));
  std::vector<char> grad_reference(header.wants_reference_grad * references * header.num_heads * sizeof(T));
  std::vector<char> grad_locations = unwritten(2 * samples * sizeof(T));
  std::vector<char> grad_weights = unwritten(samples * sizeof(T));

  const auto numbers = [](const std::vector<char>& from) { return reinterpret_cast<const T*>(from.data()); };
  problem.shapes = reinterpret_cast<const int64_t*>(shapes.data());
  problem.value = value.data(), problem.reference = numbers(reference);
  problem.locations = numbers(locations), problem.weights = numbers(weights);
  problem.out = out.data(), problem.grad_out = grad_out.data(), problem.grad_value = grad_value.data();
  problem.grad_locations = const_cast<T*>(numbers(grad_locations));
  problem.grad_weights = const_cast<T*>(numbers(grad_weights));
  if (header.wants_reference_grad) problem.grad_reference = const_cast<T*>(numbers(grad_reference));

  using emulation::Order;
  emulation::order.kind = header.order < 2 ? static_cast<Order::Kind>(header.order) : Order::random;
  emulation::order.generator.seed(static_cast<unsigned>(header.order));
  detrs::cuda::forward(problem, nullptr);
  detrs::cuda::backward(problem, nullptr);
  for (const auto* tensor : {&out, &grad_value, &grad_reference, &grad_locations, &grad_weights})
    write(results, *tensor);
}

}  // namespace

int main(int num_arguments, char** arguments) {
  if (num_arguments > 3) emulation::planted = std::atoi(arguments[3]);
  emulation::shared_memory = detrs::cuda::shared_memory;
  emulation::shared_capacity = sizeof detrs::cuda::shared_memory;
  std::FILE *cases = std::fopen(arguments[1], "rb"), *results = std::fopen(arguments[2], "wb");
  if (cases == nullptr || results == nullptr) return 1;
  Header header;
  while (std::fread(&header, sizeof header, 1, cases) == 1)
    header.storage == 1 ? run<double>(header, cases, results) : run<float>(header, cases, results);
  std::fclose(cases);
  return std::fclose(results);
}

// Runs block_attention's kernels on cases from files: `block_attention FOLDER...`.
//
// A folder holds `case`, lines of a name and numbers, and one file of raw storage per tensor; `output` and `lse` are
// written to it. Every tensor is allocated at its exact size, so AddressSanitizer sees what lies outside. Where only one kind
// of case is run, EMULATED_HEAD_DIM, EMULATED_BFLOAT16 and EMULATED_WGMMA leave the other kernels uncompiled.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "block_attention/kernel.cuh"
#include "block_attention/merge.cuh"
#include "block_attention/sm_90a/kernel.cuh"
#include "block_attention/sm_90a/kernel_hd256.cuh"

namespace dgemma {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(size_t bytes, int fill) {
  Memory memory(static_cast<char*>(std::malloc(bytes)));
  std::memset(memory.get(), fill, bytes);
  return memory;
}

struct Case {
  std::string folder;
  std::map<std::string, std::vector<double>> numbers;
  std::vector<Memory> alive;

  explicit Case(const std::string& path) : folder(path) {
    std::ifstream file(folder + "/case");
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string name;
      words >> name;
      numbers[name].assign(std::istream_iterator<double>(words), {});
    }
    if (numbers.empty()) emulation::fail("%s/case cannot be read", folder.c_str());
  }

  double number(const std::string& name) const { return numbers.at(name).at(0); }

  const char* storage(const std::string& name) {
    std::ifstream file(folder + "/" + name, std::ios::binary);
    if (!file) return nullptr;
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    alive.push_back(allocate(bytes.size(), 0));
    std::memcpy(alive.back().get(), bytes.data(), bytes.size());
    return alive.back().get();
  }

  HeadsView view(const std::string& name) {
    HeadsView result;
    if (numbers.count(name) == 0) return result;
    const std::vector<double>& n = numbers.at(name);
    result.data = storage(name) + size_t(n[0]) * 2;
    result.batch_stride = int64_t(n[1]);
    result.head_stride = int64_t(n[2]);
    result.slot_stride = int64_t(n[3]);
    result.aligned = n[4] != 0;
    return result;
  }

  template <class T>
  T* output(size_t count) {
    alive.push_back(allocate(count * sizeof(T), 0xff));
    return reinterpret_cast<T*>(alive.back().get());
  }

  void write(const std::string& name, const void* data, size_t bytes) const {
    std::ofstream(folder + "/" + name, std::ios::binary).write(static_cast<const char*>(data), int64_t(bytes));
  }
};

template <class Shape>
int64_t tiles_of_rows(const BlockAttentionParams& p) {
  const int64_t rows = p.query_heads / p.kv_heads * p.length;
  return (rows + Shape::kRows - 1) / Shape::kRows * p.batch * p.kv_heads;
}

template <class T, int kHeadDim>
void run(const BlockAttentionParams& p, bool wgmma) {
#if defined(EMULATED_WGMMA)
  if (!wgmma) emulation::fail("the portable kernel is not compiled in");
#else
  if (!wgmma) {
    using Shape = BlockAttentionShape<kHeadDim>;
    emulation::run({tiles_of_rows<Shape>(p), p.splits, 1}, Shape::kThreads, Shape::kSharedBytes,
                   [&] { block_attention_kernel<T, kHeadDim>(p); });
    return;
  }
#endif
  if constexpr (kHeadDim >= 256) {
    using Shape = BlockAttentionWgmmaShape<kHeadDim>;
    emulation::run({tiles_of_rows<Shape>(p) * Shape::kCluster, p.splits, 1}, Shape::kThreads, Shape::kSharedBytes,
                   [&] {
                     if constexpr (Shape::kCluster == 1)
                       block_attention_wgmma_kernel<T>(p);
                     else
                       block_attention_cluster_kernel<T>(p);
                   },
                   Shape::kCluster);
  } else {
    emulation::fail("head_dim %d has no wgmma kernel", kHeadDim);
  }
}

template <class T, int kHeadDim>
void run_and_merge(const BlockAttentionParams& p, bool wgmma) {
  run<T, kHeadDim>(p, wgmma);
  if (p.splits == 1) return;
  const int64_t rows_per_block = kBlockAttentionMergeThreads / (kHeadDim / 4);
  emulation::run({(p.batch * p.query_heads * p.length + rows_per_block - 1) / rows_per_block, 1, 1},
                 kBlockAttentionMergeThreads, 0, [&] { block_attention_merge_kernel<T>(p); });
}

template <class T>
void run_head_dim(const BlockAttentionParams& p, bool wgmma) {
#if defined(EMULATED_HEAD_DIM)
  if (p.head_dim == EMULATED_HEAD_DIM) return run_and_merge<T, EMULATED_HEAD_DIM>(p, wgmma);
#else
  switch (p.head_dim) {
    case 64: return run_and_merge<T, 64>(p, wgmma);
    case 128: return run_and_merge<T, 128>(p, wgmma);
    case 256: return run_and_merge<T, 256>(p, wgmma);
    case 512: return run_and_merge<T, 512>(p, wgmma);
  }
#endif
  emulation::fail("head_dim %lld is not compiled in", (long long)p.head_dim);
}

void run_case(const std::string& folder) {
  Case c(folder);
  BlockAttentionParams p;
  p.dtype = Dtype(int(c.number("dtype")));
  p.batch = int64_t(c.number("batch"));
  p.query_heads = int64_t(c.number("query_heads"));
  p.kv_heads = int64_t(c.number("kv_heads"));
  p.length = int64_t(c.number("length"));
  p.head_dim = int64_t(c.number("head_dim"));
  p.prefix_length = int64_t(c.number("prefix_length"));
  p.query = c.view("query");
  p.key = c.view("key");
  p.value = c.view("value");
  p.prefix_key = c.view("prefix_key");
  p.prefix_value = c.view("prefix_value");
  p.prefix_start = reinterpret_cast<const int32_t*>(c.storage("prefix_start"));
  p.prefix_end = reinterpret_cast<const int32_t*>(c.storage("prefix_end"));
  p.scale = float(c.number("scale"));
  p.softcap = float(c.number("softcap"));
  p.causal = c.number("causal") != 0;
  if (c.numbers.count("window") != 0) p.window = int64_t(c.number("window"));
  p.splits = int64_t(c.number("splits"));
  const size_t rows = size_t(p.batch * p.query_heads * p.length), elements = rows * size_t(p.head_dim);
  p.output = c.output<uint16_t>(elements);
  p.lse = c.output<float>(rows);
  if (p.splits > 1) {
    p.partial_output = c.output<float>(elements * size_t(p.splits));
    p.partial_lse = c.output<float>(rows * size_t(p.splits));
  }
  const bool wgmma = c.numbers.count("wgmma") != 0;
  if (p.dtype == Dtype::kBFloat16)
    run_head_dim<Bfloat16>(p, wgmma);
  else
#if defined(EMULATED_BFLOAT16)
    emulation::fail("fp16 is not compiled in");
#else
    run_head_dim<Float16>(p, wgmma);
#endif
  c.write("output", p.output, elements * 2);
  c.write("lse", p.lse, rows * sizeof(float));
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}

// Runs the CUDA kernels of soft_embedding on the host: `soft_embedding_emulated FOLDER...`, a case per folder. The
// products between them, which are the vendor's on a GPU, are plain loops here.
#include "case_files.h"
#include "soft_embedding/kernel.cuh"

namespace dgemma {
namespace {

// target [rows, E] = probabilities [rows, columns], of which `tokens` are taken, times weight [tokens, E].
template <class T>
void multiply(const SoftEmbeddingParams& p, const T* weight, int64_t tokens, float* target) {
  const T* probabilities = static_cast<const T*>(p.probabilities);
  for (int64_t row = 0; row < p.rows0 * p.rows1; ++row)
    for (int64_t column = 0; column < p.embedding; ++column) {
      double sum = 0;
      for (int64_t i = 0; i < tokens; ++i)
        sum += double(to_float(probabilities[row * p.columns + i])) * to_float(weight[i * p.embedding + column]);
      target[row * p.embedding + column] = float(sum);
    }
}

template <class T>
void run(const SoftEmbeddingParams& p, const void* weight, float* partial) {
  const int64_t slices = (p.vocab + p.columns - 1) / p.columns, rows = p.rows0 * p.rows1;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t tokens = soft_embedding_slice_tokens(p, slice), first = slice * p.columns;
    emulation::run({soft_embedding_blocks(p, slice), 1, 1}, kSoftEmbeddingThreads, 0,
                   [&] { soft_embedding_probabilities_kernel<T>(p, first, int(soft_embedding_tiles(tokens))); });
    multiply(p, static_cast<const T*>(weight) + first * p.embedding, tokens, partial + slice * rows * p.embedding);
  }
  constexpr int kColumns = kSoftEmbeddingSumThreads * 4;
  emulation::run({rows, (p.embedding + kColumns - 1) / kColumns, 1}, kSoftEmbeddingSumThreads, 0,
                 [&] { soft_embedding_sum_kernel<T>(p, int(soft_embedding_tiles(p.vocab)), int(slices)); });
}

void run_case(const char* folder) {
  Case c(folder);
  SoftEmbeddingParams p;
  p.dtype = Dtype(c.integer("dtype"));
  p.logits = c.tensor<char>("logits") + c.integer("storage_offset") * 2;
  p.rows0 = c.integer("rows0");
  p.rows1 = c.integer("rows1");
  p.vocab = c.integer("vocab");
  p.stride0 = c.integer("stride0");
  p.stride1 = c.integer("stride1");
  p.argmax = c.tensor<int64_t>("argmax");
  p.top1_prob = c.tensor<float>("top1_prob");
  p.temperature = c.row_parameter<float>("temperature");
  p.softcap = float(c.number("softcap"));
  p.columns = c.integer("columns");
  p.embedding = c.integer("embedding");
  const int64_t rows = p.rows0 * p.rows1, slices = (p.vocab + p.columns - 1) / p.columns;
  p.probabilities = c.output<char>("probabilities", rows * p.columns * 2);
  p.masses = c.output<float>("masses", rows * soft_embedding_tiles(p.vocab));
  float* partial = c.output<float>("partial", slices * rows * p.embedding);
  p.partial = partial;
  p.output = c.output<char>("output", rows * p.embedding * 2);
  const char* weight = c.tensor<char>("weight");
  if (p.dtype == Dtype::kBFloat16)
    run<Bfloat16>(p, weight, partial);
  else
    run<Float16>(p, weight, partial);
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}

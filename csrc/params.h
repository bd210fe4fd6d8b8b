// One plain struct per op: raw pointers, sizes in elements, strides in elements. No PyTorch.
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace dgemma {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A parameter given by value, as one device value, or as one value per row.
template <class T>
struct RowParameter {
  const T* pointer = nullptr;  // nullptr: `value` holds for every row
  int64_t stride = 0;          // 0: one value for all rows; 1: one per row
  T value{};
};

template <class T>
DGEMMA_HD T of_row(const RowParameter<T>& parameter, int64_t row) {
  return parameter.pointer ? parameter.pointer[row * parameter.stride] : parameter.value;
}

struct RowStatsParams {
  const void* logits = nullptr;  // [rows0, rows1, vocab], last stride 1
  Dtype dtype = Dtype::kFloat32;
  int64_t rows0 = 0, rows1 = 0, vocab = 0;
  int64_t stride0 = 0, stride1 = 0;          // elements
  RowParameter<float> temperature;           // [rows0 * rows1], >= 0; 0 is greedy
  RowParameter<float> stats_temperature;     // [rows0 * rows1], > 0
  bool has_stats_temperature = false;        // false: the row's temperature, or 1 where that is 0
  float softcap = 0;                         // logit units; 0: none
  const float* uniform = nullptr;            // [rows0 * rows1] in [0, 1), or nullptr: drawn from Philox
  RowParameter<int64_t> seed, offset;        // scalars

  int64_t* argmax = nullptr;                 // [rows0 * rows1]
  int64_t* sample = nullptr;                 // [rows0 * rows1]
  float* entropy = nullptr;                  // [rows0 * rows1], nats
  float* logsumexp = nullptr;                // [rows0 * rows1], nats
  float* top1_prob = nullptr;                // [rows0 * rows1]
  float* top2_prob = nullptr;                // [rows0 * rows1]
  float* sample_prob = nullptr;              // [rows0 * rows1]

  void* workspace = nullptr;                 // row_stats_workspace_bytes(params) bytes

  const float* cutoff = nullptr;             // [rows0 * rows1], logits below it are left out; nullptr: none are
};

struct TopKTopPParams {
  const void* logits = nullptr;  // [rows0, rows1, vocab], last stride 1
  Dtype dtype = Dtype::kFloat32;
  int64_t rows0 = 0, rows1 = 0, vocab = 0;
  int64_t stride0 = 0, stride1 = 0;  // elements
  RowParameter<float> temperature;   // [rows0 * rows1], >= 0; 0 counts as 1
  int64_t top_k = 0;                 // 0: none
  float top_p = 1;                   // 1: none
  bool top_k_first = false;
  float softcap = 0;                 // logit units; 0: none
  float* cutoff = nullptr;           // [rows0 * rows1]
};

// The values of `samplers.encoding`: Measure, Select, Flag, Write.
enum class Measure : int32_t { kSampleProb = 0, kTop1Prob, kEntropy, kMargin, kRandom, kPosition };
enum class Select : int32_t { kTopK = 0, kThreshold, kFactor, kEntropyBound, kBernoulli, kHierarchy, kEdit };
enum class Write : int32_t { kRemask = 0, kRenoise, kKeep };
constexpr int32_t kStrict = 1, kRelative = 2, kInclusive = 4, kLastRankQuirk = 8, kGumbel = 16;

struct CommitParams {
  int64_t batch = 0, length = 0;             // B, C
  const int64_t* tokens = nullptr;           // [B, C]
  const int64_t* argmax = nullptr;           // [B, C], read when there is a state
  const int64_t* sample = nullptr;           // [B, C]
  const float* entropy = nullptr;            // [B, C], nats
  const float* sample_prob = nullptr;        // [B, C]
  const float* top1_prob = nullptr;          // [B, C]
  const float* top2_prob = nullptr;          // [B, C]
  const bool* candidates = nullptr;          // [B, C], or nullptr: all positions

  Measure measure = Measure::kSampleProb;
  Select select = Select::kTopK;
  int32_t flags = 0;
  RowParameter<int64_t> k;                   // [B] or scalar, positions
  RowParameter<float> value, value2;         // [B] or scalar, units of the rule
  int64_t mask_id = -1;
  Write write = Write::kRemask;
  int64_t write_argument = 0;                // the mask token or the vocabulary size
  RowParameter<int64_t> seed, offset;        // scalars

  const int64_t* draft = nullptr;            // [B, C], nullptr: no state
  const int64_t* history = nullptr;          // [S, B, C], oldest first
  const bool* finished = nullptr;            // [B]
  int64_t depth = 0;                         // S
  bool has_confidence = false;               // false: rows never finish
  RowParameter<float> confidence;            // scalar, nats

  int64_t* new_tokens = nullptr;             // [B, C]
  bool* committed = nullptr;                 // [B, C]
  int64_t* num_committed = nullptr;          // [B]
  int64_t* new_draft = nullptr;              // [B, C]
  int64_t* new_history = nullptr;            // [S, B, C]
  bool* new_finished = nullptr;              // [B]
};

// What `commit` left of a block: which rows go on. The fields up to `last` are those of `reference.progress`.
struct ProgressParams {
  int64_t batch = 0, length = 0;             // B, C
  const int64_t* tokens = nullptr;           // [B, C]
  const int64_t* new_tokens = nullptr;       // [B, C]
  const bool* open = nullptr;                // [B, C]
  const float* entropy = nullptr;            // [B, C], nats
  const bool* active = nullptr;              // [B]
  const bool* stuck = nullptr;               // [B]
  const int64_t* nfe = nullptr;              // [B]
  const bool* finished = nullptr;            // [B], or nullptr: rows without a mask left
  int64_t mask_id = -1;
  bool noise = false;
  bool ends_unchanged = false;
  bool last = false;

  bool* new_active = nullptr;                // [B]
  bool* new_stuck = nullptr;                 // [B]
  int64_t* new_nfe = nullptr;                // [B]
};

// Rows in FP8, each with a scale that brings its largest number to 448.
struct QuantizeRowsParams {
  const void* rows = nullptr;                // [count, width], last stride 1
  Dtype dtype = Dtype::kBFloat16;            // of rows
  int64_t count = 0, width = 0;
  int64_t stride = 0;                        // elements
  uint8_t* numbers = nullptr;                // [count, width], float8_e4m3fn
  float* scales = nullptr;                   // [count]
};

struct SoftEmbeddingParams {
  const void* logits = nullptr;              // [rows0, rows1, vocab], last stride 1
  Dtype dtype = Dtype::kBFloat16;            // of logits, probabilities and output; fp16 or bf16
  int64_t rows0 = 0, rows1 = 0, vocab = 0;
  int64_t stride0 = 0, stride1 = 0;          // elements
  const int64_t* argmax = nullptr;           // [rows0 * rows1], clamped to the row
  const float* top1_prob = nullptr;          // [rows0 * rows1]; where it is not > 0, the row has no distribution
  RowParameter<float> temperature;           // [rows0 * rows1], > 0
  float softcap = 0;                         // logit units; 0: none
  int64_t columns = 0;                       // tokens of a slice; a multiple of kSoftEmbeddingTile
  int64_t embedding = 0;                     // E

  void* probabilities = nullptr;             // [rows0 * rows1, columns] of one slice, in fp16 times 2^14
  float* masses = nullptr;                   // [rows0 * rows1, tiles of the vocabulary], of the rounded probabilities
  const float* partial = nullptr;            // [slices, rows0 * rows1, E], each slice's product with the weight
  void* output = nullptr;                    // [rows0 * rows1, E]
};

// Keys, values or queries of every head: [B, H, slots, D], last stride 1.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, slot_stride = 0;  // elements
  bool aligned = false;                      // every row starts on a 16-byte boundary
};

// Wider than any context and still far enough from 2^31 for sums with it.
constexpr int64_t kNoWindow = 0x7fff0000;

struct BlockAttentionParams {
  Dtype dtype = Dtype::kBFloat16;            // of queries, keys, values and output; fp16 or bf16
  int64_t batch = 0, query_heads = 0, kv_heads = 0;  // B, Hq, Hkv; Hq is a multiple of Hkv
  int64_t length = 0;                        // C, positions of the block
  int64_t prefix_length = 0;                 // L, slots of the prefix; 0: no prefix
  int64_t head_dim = 0;                      // D
  HeadsView query;                           // [B, Hq, C, D]
  HeadsView key, value;                      // [B, Hkv, C, D]
  HeadsView prefix_key, prefix_value;        // [B, Hkv, L, D]
  const int32_t* prefix_start = nullptr;     // [B] slots, clamped to [0, L]; nullptr: 0
  const int32_t* prefix_end = nullptr;       // [B] slots, clamped to [0, L]; nullptr: L
  float scale = 1;                           // factor on the scores
  float softcap = 0;                         // score units; 0: none
  bool causal = false;                       // inside the block only
  int64_t window = kNoWindow;                // keys at a distance below it are seen, >= 1; only where causal

  void* output = nullptr;                    // [B, C, Hq, D]
  float* lse = nullptr;                      // [B, Hq, C], nats

  int64_t splits = 1;                        // blocks of threads that share the keys of one tile of rows
  float* partial_output = nullptr;           // [splits, B * Hkv, C * Hq / Hkv, D]; nullptr where splits is 1
  float* partial_lse = nullptr;              // [splits, B * Hkv, C * Hq / Hkv], nats
};

// How weights are stored: in the dtype of the rows, as e4m3 numbers, or as e2m1 numbers, two in a byte.
enum class WeightFormat : int32_t { kPlain = 0, kFp8, kNvfp4 };
// The values of `reference.experts.ACTIVATIONS`, in its order.
enum class Activation : int32_t { kGeluTanh = 0, kSilu };

// A matrix of every expert: [X, N, K], contiguous, from a multiple of 16 bytes on.
struct ExpertsMatrix {
  WeightFormat format = WeightFormat::kPlain;
  const void* weights = nullptr;             // kNvfp4: [X, N, K / 2] bytes, an even column in the low four bits
  const void* scale = nullptr;               // kFp8: fp32; kNvfp4: e4m3 [X, N, K / 16]
  bool scale_by_row = false;                 // kFp8: [X, N] instead of [X, ceil(N / 128), ceil(K / 128)]
  const float* global_scale = nullptr;       // kNvfp4: [X, global_scales]
  int64_t global_scales = 1;                 // 2: of the gate's rows and of the others
};

// A pair is a (row, choice), numbered row * K + choice.
struct ExpertsParams {
  Dtype dtype = Dtype::kBFloat16;            // of rows and result; fp16 or bf16
  int64_t rows = 0, top_k = 0;               // R, K
  int64_t experts = 0;                       // X
  int64_t width = 0, embedding = 0;          // I, E; multiples of 32
  Activation activation = Activation::kGeluTanh;
  const void* hidden = nullptr;              // [R, E], rows from multiples of 16 bytes on
  int64_t hidden_stride = 0;                 // elements; R * hidden_stride below 2^35
  const int64_t* index = nullptr;            // [R, K]; outside [0, X): no expert
  const void* choice_weights = nullptr;      // [R, K]
  Dtype choice_dtype = Dtype::kFloat32;
  int64_t choice_stride0 = 0, choice_stride1 = 0;  // elements
  ExpertsMatrix gate_up;                     // N = 2 I, the gate's rows first; K = E
  ExpertsMatrix down;                        // N = E, K = I

  void* output = nullptr;                    // [R, E]
  void* workspace = nullptr;                 // experts_cuda_workspace(params) bytes, from a multiple of 16 on
};

}  // namespace dgemma

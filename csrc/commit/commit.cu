#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "commit.h"
#include "kernel.cuh"

namespace dgemma {

void commit_cuda(const CommitParams& params, void* stream) {
  if (params.length > kCommitMaxLength)
    throw std::runtime_error("commit: canvas of " + std::to_string(params.length) + " positions, at most " +
                             std::to_string(kCommitMaxLength) + " are supported");
  const int threads = commit_threads(params.length);
  launch("commit", commit_kernel, dim3(unsigned(params.batch)), unsigned(threads), commit_shared_bytes(threads),
         stream, params);
}

}  // namespace dgemma

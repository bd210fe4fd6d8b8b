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
  unsigned threads = 32;
  while (threads < params.length) threads *= 2;
  launch("commit", commit_kernel, dim3(unsigned(params.batch)), threads, commit_shared_bytes(int(threads)), stream,
         params);
}

}  // namespace dgemma

// The arguments of the DTO launchers. nabla_fast/ops/cuda.py mirrors them: fields are 8 bytes each, so there is no
// padding.
#pragma once

#include <cstdint>

// The arguments of dto_step. Rows lie `..._stride` elements apart, their elements side by side.
struct DtoRows {
  float* parameters;           // (N, width), updated; width is d for latents and V for logits
  float* exp_avg;              // (N, width), updated
  float* exp_avg_sq;           // (N, width), updated
  int64_t* step;               // (N), updated
  const int64_t* tokens;       // (N)
  const void* learning_rates;  // (rates), float32 or float64
  const float* gradient;       // (N, V)
  const float* soft_noise;     // (N, V) or null
  const float* hard_noise;     // (N, V) or null
  int64_t* token;              // (N), result
  uint8_t* changed;            // (N), result
  void* scratch;               // as many bytes as the plan says, 16-byte aligned
  int64_t parameters_stride, exp_avg_stride, exp_avg_sq_stride, gradient_stride, soft_noise_stride, hard_noise_stride;
  int64_t rows, vocabulary, rates, rates_are_double, max_steps;
  double tau, weight_decay;
};

struct DtoHead {
  const void* weight;  // (V, d): 16-byte aligned, and so is every row of it
  int64_t type;        // 0 float32, 1 bfloat16, 2 float16
  int64_t stride;      // elements between rows
  int64_t hidden;      // d, at most 8192
  double scale, softcap;
};

// How a launch divides the device. It depends on the device and the sizes alone, so callers keep it. Team 0: this
// device cannot run it.
struct DtoPlan {
  int64_t team;     // thread blocks per row
  int64_t kept;     // logits: most entries that a thread keeps in registers from step to step, 0: none
  int64_t threads;  // latents: threads per block
  int64_t stages;   // latents: tiles of the head in a block's shared memory
  int64_t scratch_bytes;
};

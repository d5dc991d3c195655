// The device itself: what torch asks for under CUDA's name.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/Generator.h>

namespace emulated {

const at::Generator& default_generator();
at::Generator& cpu_generator_of(const at::Generator& generator);  // that draws the numbers

}  // namespace emulated

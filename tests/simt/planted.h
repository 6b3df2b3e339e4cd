#pragma once

#include <string>

// Run the kernel of this name in planted.cu on n elements of x and y.
void planted(const std::string& name, float* x, float* y, int n);

// What this library was built with and for, as text in the file: qrosa/ops/cuda_build.py reads it before it loads the
// library, because loading already registers the kernels, and a card or a driver that they do not serve must get the
// plain PyTorch composition instead.
#include <cuda_runtime_api.h>

#define QROSA_TEXT_OF(value) #value
#define QROSA_TEXT(value) QROSA_TEXT_OF(value)

extern "C" {
extern const char qrosa_cuda_build[];
const char qrosa_cuda_build[] =
    "qrosa-cuda-build runtime=" QROSA_TEXT(CUDART_VERSION) " targets=" QROSA_CUDA_TARGETS ";";
}

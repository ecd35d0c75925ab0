// glibc's word on whether a process has one thread only, which libstdc++'s reference counts ask for since glibc 2.32.
// The library brings its own, so that it loads under glibc 2.28, as PyTorch's wheels do: counts are then atomic always.

extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
extern "C" char __libc_single_threaded = 0;

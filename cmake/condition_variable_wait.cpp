// std::condition_variable::wait, for the library or program that it is linked into. With GCC 12, libstdc++ gave this
// function a new version (GLIBCXX_3.4.30). It is the only one of llama.cpp's symbols that GCC 11's libstdc++ lacks,
// which systems of manylinux_2_34 have. What it does is the same in both.
#include <pthread.h>

#include <condition_variable>
#include <mutex>

extern "C" __attribute__((visibility("hidden"))) void thimble_condition_variable_wait(
    std::condition_variable* self,
    std::unique_lock<std::mutex>* lock) __asm__("_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE");

void thimble_condition_variable_wait(std::condition_variable* self, std::unique_lock<std::mutex>* lock) {
  pthread_cond_wait(self->native_handle(), lock->mutex()->native_handle());
}

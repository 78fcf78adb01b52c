// A library that is found at run time.
#pragma once

#include <dlfcn.h>

namespace structkv {

// Looks functions of a loaded library up, and remembers the first one that is missing. Neither
// opens nor closes the library.
class Symbols {
 public:
  // `library`: of dlopen.
  explicit Symbols(void* library) : library_(library) {}

  template <typename Function>
  void Find(const char* name, Function** function) {
    void* const symbol = dlsym(library_, name);
    if (symbol == nullptr && missing_ == nullptr) missing_ = name;
    *function = reinterpret_cast<Function*>(symbol);
  }

  // Null: none.
  const char* missing() const { return missing_; }

 private:
  void* const library_;
  const char* missing_ = nullptr;
};

}  // namespace structkv

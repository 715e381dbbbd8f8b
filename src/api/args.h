// Every structure of the API begins with its size in the header that the caller was compiled with.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "api/status.h"

namespace thimble::api {

template <typename Args>
void check_size(const Args* args, const std::string& name) {
  require(args != nullptr, [&] { return name + " is null"; });
  require(args->struct_size >= sizeof(Args), [&] {
    return name + ".struct_size is " + std::to_string(args->struct_size) + ": set it to sizeof(" + name +
           "), which is " + std::to_string(sizeof(Args));
  });
}

/// Copies the caller's structure to this version's. Members that a later version added must be 0, since they ask for
/// something that this library does not know.
template <typename Args>
Args take_args(const Args* args, const std::string& name) {
  check_size(args, name);
  const auto* bytes = reinterpret_cast<const char*>(args);
  if (std::any_of(bytes + sizeof(Args), bytes + args->struct_size, [](char byte) { return byte != 0; })) {
    throw Failure(THIMBLE_UNSUPPORTED, name + " has members that this version of the library (" THIMBLE_VERSION
                                              ") does not know: leave them 0 or use a newer library");
  }
  return *args;
}

/// Fills a structure that the caller reads. Members that a later version added become 0.
template <typename Info>
void give_info(Info from, Info* info, const std::string& name) {
  check_size(info, name);
  from.struct_size = info->struct_size;
  std::memset(reinterpret_cast<char*>(info) + sizeof(Info), 0, from.struct_size - sizeof(Info));
  *info = from;
}

}  // namespace thimble::api

// Whether a program can have the plugin in it, as far as its file tells.
#pragma once

#include <string>

namespace thimble {

/// Throws std::runtime_error, with a sentence that names the file, where a program cannot load the plugin: it is for
/// another processor, its C library is musl and not glibc, or it is linked statically. Says nothing of scripts, nor of
/// files that are no programs at all.
void check_host_file(const std::string& path);

}  // namespace thimble

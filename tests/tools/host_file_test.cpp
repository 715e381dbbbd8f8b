// Programs that cannot have the plugin in them, told by their files: made here, header by header.
#include "host_file.h"

#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <stdexcept>

#include "support/temporary_folder.h"

namespace thimble {
namespace {

Elf64_Ehdr own_header() {
  Elf64_Ehdr header{};
  std::ifstream("/proc/self/exe", std::ios::binary).read(reinterpret_cast<char*>(&header), sizeof(header));
  return header;
}

// A file with the header of this test's own program, but for `machine` and `bits`, and with `loader` or none.
std::string error_of(int machine, unsigned char bits, const std::string& loader) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("llama-server");
  Elf64_Ehdr header = own_header();
  header.e_machine = Elf64_Half(machine);
  header.e_ident[EI_CLASS] = bits;
  header.e_phoff = sizeof(header);
  header.e_phnum = 2;
  Elf64_Phdr parts[2]{};
  parts[0].p_type = PT_LOAD;
  parts[1].p_type = loader.empty() ? PT_NOTE : PT_INTERP;
  parts[1].p_offset = sizeof(header) + sizeof(parts);
  parts[1].p_filesz = loader.size() + 1;
  {
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&header), sizeof(header));
    file.write(reinterpret_cast<const char*>(parts), sizeof(parts));
    file.write(loader.c_str(), std::streamsize(loader.size() + 1));
  }
  try {
    check_host_file(path);
    return {};
  } catch (const std::runtime_error& error) {
    const std::string said = error.what();
    EXPECT_EQ(said.find(path), 0U) << said;
    return said.substr(path.size());
  }
}

TEST(HostFile, OfThisKindIsAccepted) {
  EXPECT_NO_THROW(check_host_file("/proc/self/exe"));
  EXPECT_EQ(error_of(own_header().e_machine, ELFCLASS64, "/lib64/ld-linux-x86-64.so.2"), "");
}

TEST(HostFile, OfMuslIsRefused) {
  EXPECT_EQ(error_of(own_header().e_machine, ELFCLASS64, "/lib/ld-musl-x86_64.so.1"),
            " runs on musl (/lib/ld-musl-x86_64.so.1), and the plugin on glibc: take a llama.cpp that is built for "
            "glibc");
}

TEST(HostFile, OfAnotherProcessorIsRefused) {
  const bool is_arm = own_header().e_machine == EM_AARCH64;
  const std::string other = error_of(is_arm ? EM_X86_64 : EM_AARCH64, ELFCLASS64, "/lib/ld-linux-aarch64.so.1");
  EXPECT_EQ(other.find(is_arm ? " is a program for x86-64, and" : " is a program for 64-bit Arm, and"), 0U) << other;
  EXPECT_EQ(error_of(EM_386, ELFCLASS32, "/lib/ld-linux.so.2").find(" is a program for 32-bit x86, and"), 0U);
}

TEST(HostFile, LinkedStaticallyIsRefused) {
  EXPECT_EQ(error_of(own_header().e_machine, ELFCLASS64, "").find(" is linked statically, so it cannot load"), 0U);
}

TEST(HostFile, OfScriptsAndEmptyFilesNothingIsSaid) {
  const test::TemporaryFolder folder;
  std::ofstream(folder.file("script")) << "#!/bin/sh\n";
  std::ofstream(folder.file("empty"));
  EXPECT_NO_THROW(check_host_file(folder.file("script")));
  EXPECT_NO_THROW(check_host_file(folder.file("empty")));
  EXPECT_NO_THROW(check_host_file(folder.file("nowhere")));
}

}  // namespace
}  // namespace thimble

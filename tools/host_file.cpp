#include "host_file.h"

#include <elf.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace thimble {
namespace {

// The parts of an ELF file that say what it runs on.
struct ElfFile {
  bool is_elf = false;
  int bits = 0, machine = 0;  // EI_CLASS, e_machine
  std::string interpreter;    // the dynamic loader; empty in what is linked statically
};

// The header's first members lie alike in files of 32 and of 64 bits. The loader is read of those of 64 bits alone, and
// of this machine's byte order: others are refused by their processor.
ElfFile read_elf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Elf64_Ehdr header{};
  ElfFile elf;
  if (!file.read(reinterpret_cast<char*>(&header), sizeof(header))) return elf;
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return elf;
  elf.is_elf = true;
  elf.bits = header.e_ident[EI_CLASS];
  elf.machine = header.e_machine;
  for (int i = 0; elf.bits == ELFCLASS64 && i < header.e_phnum; i++) {
    Elf64_Phdr part{};
    file.seekg(std::streamoff(header.e_phoff + uint64_t(i) * header.e_phentsize));
    if (!file.read(reinterpret_cast<char*>(&part), sizeof(part))) break;
    if (part.p_type != PT_INTERP || part.p_filesz > 4096) continue;
    elf.interpreter.resize(part.p_filesz);
    file.seekg(std::streamoff(part.p_offset));
    file.read(elf.interpreter.data(), std::streamsize(part.p_filesz));
    elf.interpreter = elf.interpreter.c_str();  // without the zero at its end
    break;
  }
  return elf;
}

std::string processor(const ElfFile& elf) {
  switch (elf.machine) {
    case EM_X86_64:
      return elf.bits == ELFCLASS64 ? "x86-64" : "x86-64 with 32-bit pointers";
    case EM_386:
      return "32-bit x86";
    case EM_AARCH64:
      return "64-bit Arm";
    case EM_ARM:
      return "32-bit Arm";
    case EM_RISCV:
      return "RISC-V";
    case EM_PPC64:
      return "POWER";
    case EM_S390:
      return "IBM Z";
    default:
      return "the processor that ELF calls number " + std::to_string(elf.machine);
  }
}

}  // namespace

void check_host_file(const std::string& path) {
  const ElfFile host = read_elf(path), own = read_elf("/proc/self/exe");
  if (!host.is_elf || !own.is_elf) return;
  if (host.machine != own.machine || host.bits != own.bits) {
    throw std::runtime_error(path + " is a program for " + processor(host) + ", and this Thimble is for " +
                             processor(own) + ": take a llama.cpp and a Thimble for one processor");
  }
  if (host.interpreter.empty()) {
    throw std::runtime_error(path + " is linked statically, so it cannot load a plugin: take a llama.cpp with shared " +
                             "libraries, as its releases have");
  }
  if (std::filesystem::path(host.interpreter).filename().string().starts_with("ld-musl")) {
    throw std::runtime_error(path + " runs on musl (" + host.interpreter + "), and the plugin on glibc: take a " +
                             "llama.cpp that is built for glibc");
  }
}

}  // namespace thimble

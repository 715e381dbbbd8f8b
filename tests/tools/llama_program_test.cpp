// Which llama.cpp's programs `thimble run` and `thimble serve` start.
#include "llama_program.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "support/temporary_folder.h"

namespace thimble {
namespace {

namespace fs = std::filesystem;

void make_program(const std::string& path) {
  std::ofstream(path) << "#!/bin/sh\n";
  fs::permissions(path, fs::perms::owner_all);
}

std::string error_of(const std::string& name, const std::string& chosen) {
  try {
    return "no error: " + llama_program(name, chosen);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

class LlamaProgram : public testing::Test {
protected:
  void SetUp() override {
    const char* path = std::getenv("PATH");
    path_ = path ? path : "";
    for (const char* name : {"llama-server", "llama-completion"}) make_program(folder_.file(name));
  }
  void TearDown() override {
    setenv("PATH", path_.c_str(), 1);
    unsetenv("THIMBLE_LLAMA");
  }

  test::TemporaryFolder folder_;
  std::string path_;
};

TEST_F(LlamaProgram, IsChosenByFolderOrByOneOfItsPrograms) {
  EXPECT_EQ(llama_program("llama-server", folder_.path()), folder_.file("llama-server"));
  EXPECT_EQ(llama_program("llama-server", folder_.file("llama-server")), folder_.file("llama-server"));
  EXPECT_EQ(llama_program("llama-completion", folder_.file("llama-server")), folder_.file("llama-completion"));
  EXPECT_EQ(llama_program("llama-server", folder_.file("llama-completion")), folder_.file("llama-server"));
  EXPECT_NE(error_of("llama-cli", folder_.file("llama-server")).find("llama-cli, which --llama or"), std::string::npos);
  EXPECT_NE(error_of("llama-cli", folder_.file("nowhere")).find("there is no such file"), std::string::npos);
}

TEST_F(LlamaProgram, IsFoundWhereALinkLeads) {
  const test::TemporaryFolder links;
  fs::create_symlink(folder_.file("llama-server"), links.file("server"));
  EXPECT_EQ(llama_program("llama-completion", links.file("server")), folder_.file("llama-completion"));
  EXPECT_EQ(llama_program("llama-server", links.file("server")), links.file("server"));
}

TEST_F(LlamaProgram, IsChosenByNameOnPath) {
  EXPECT_NE(error_of("llama-server", "no-such-llama").find("neither a folder nor on PATH"), std::string::npos);
  make_program(folder_.file("my-llama"));
  setenv("PATH", ("/nowhere:" + folder_.path()).c_str(), 1);
  EXPECT_EQ(llama_program("llama-server", "my-llama"), folder_.file("my-llama"));
  EXPECT_EQ(llama_program("llama-completion", "my-llama"), folder_.file("llama-completion"));
}

TEST_F(LlamaProgram, IsSaidByTheFlagOrElseTheEnvironment) {
  EXPECT_EQ(chosen_llama(""), "");
  setenv("THIMBLE_LLAMA", "of the environment", 1);
  EXPECT_EQ(chosen_llama(""), "of the environment");
  EXPECT_EQ(chosen_llama("typed"), "typed");
}

TEST_F(LlamaProgram, WithoutAChoiceIsFoundOnPath) {
  make_program(folder_.file("llama-of-a-test"));
  EXPECT_NE(error_of("llama-of-a-test", "").find("is neither beside thimble nor on PATH"), std::string::npos);
  setenv("PATH", folder_.path().c_str(), 1);
  EXPECT_EQ(llama_program("llama-of-a-test", ""), folder_.file("llama-of-a-test"));
}

TEST_F(LlamaProgram, WithoutAChoiceIsFoundInHomebrewsFolder) {
  fs::create_directory(folder_.file("bin"));
  make_program(folder_.file("bin/llama-of-a-test"));
  setenv("HOMEBREW_PREFIX", folder_.path().c_str(), 1);
  EXPECT_EQ(llama_program("llama-of-a-test", ""), folder_.file("bin/llama-of-a-test"));
  unsetenv("HOMEBREW_PREFIX");
}

// Ollama's archive: bin/ollama, to which PATH may have a link, and lib/ollama.
TEST_F(LlamaProgram, WithoutAChoiceIsFoundBesideOllama) {
  const test::TemporaryFolder links;
  for (const char* folder : {"bin", "lib", "lib/ollama"}) fs::create_directory(folder_.file(folder));
  make_program(folder_.file("bin/ollama"));
  make_program(folder_.file("lib/ollama/llama-of-a-test"));
  fs::create_symlink(folder_.file("bin/ollama"), links.file("ollama"));
  setenv("PATH", links.path().c_str(), 1);
  EXPECT_EQ(llama_program("llama-of-a-test", ""), folder_.file("lib/ollama/llama-of-a-test"));
}

TEST(ThimbleDevices, AreThoseThatAProgramLists) {
  EXPECT_EQ(thimble_devices("Available devices:\n  THIMBLE0: coded KV cache on CPU (1 MiB)\n"), "THIMBLE0");
  EXPECT_EQ(thimble_devices("Available devices:\n  CUDA0: THIMBLE1: no\n  THIMBLE0: one\n  THIMBLE1: two\n"),
            "THIMBLE0,THIMBLE1");
  EXPECT_EQ(thimble_devices("Available devices:\n  CUDA0: a card\n"), "");
}

}  // namespace
}  // namespace thimble

// Runs a fuzz target without a fuzzer: every file of a corpus, then mutations of them, the same
// ones every time. replay CORPUS_DIRECTORY MUTATIONS
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/testing/numbers.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using structkv::testkit::Random;

// The input that runs, for the handler; it is written to a file where the target aborts.
const std::string* running = nullptr;

void WriteInput(int /*signal*/) {
  std::ofstream("replay-crash", std::ios::binary) << *running;
  std::fputs("the input is in ./replay-crash\n", stderr);
}

void Run(const std::string& input) {
  running = &input;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

// Changes one place of `input`; `other` is spliced in now and then.
void Mutate(Random* random, const std::string& other, std::string* input) {
  const auto place = [&](const std::string& text) {
    return static_cast<size_t>(random->Between(0, static_cast<int64_t>(text.size())));
  };
  const size_t at = place(*input);
  const auto length = static_cast<size_t>(random->Between(1, 8));
  switch (random->Between(0, 5)) {
    case 0:  // flip a bit
      if (at < input->size()) (*input)[at] ^= static_cast<char>(1 << random->Between(0, 7));
      break;
    case 1:  // another byte
      if (at < input->size()) (*input)[at] = static_cast<char>(random->Next());
      break;
    case 2:  // bytes at the ends of their range
      for (size_t i = at; i < std::min(at + length, input->size()); ++i) {
        (*input)[i] = random->Chance(50) ? '\xff' : '\0';
      }
      break;
    case 3:
      input->erase(at, length);
      break;
    case 4:
      input->insert(at, input->substr(place(*input), length));
      break;
    default:
      input->insert(at, other.substr(place(other), length * 8));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s CORPUS_DIRECTORY MUTATIONS\n", argv[0]);
    return 2;
  }
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  if (paths.empty()) {
    std::fprintf(stderr, "%s holds no inputs\n", argv[1]);
    return 1;
  }
  std::signal(SIGABRT, WriteInput);
  std::vector<std::string> corpus;
  for (const std::filesystem::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    Run(corpus.back());
  }
  const int mutations = std::atoi(argv[2]);
  Random random(1);
  const auto pick = [&] {
    return corpus[static_cast<size_t>(random.Between(0, static_cast<int64_t>(corpus.size()) - 1))];
  };
  for (int i = 0; i < mutations; ++i) {
    std::string input = pick();
    const int64_t changes = random.Between(1, 4);
    for (int64_t change = 0; change < changes; ++change) Mutate(&random, pick(), &input);
    Run(input);
  }
  std::printf("%zu files and %d mutations\n", corpus.size(), mutations);
  return 0;
}

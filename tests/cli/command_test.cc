// The `structkv` command as a user runs it: a process, with a real server or alone.
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "client/cli/safetensors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/cli/run_command.h"
#include "tests/testing/process.h"

namespace structkv::cli {
namespace {

using ::testing::HasSubstr;

constexpr char kCapture[] = STRUCTKV_TEST_DATA "/capture-tiny-llama-1000.safetensors";

std::string Read(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

TEST_F(CommandTest, CompressesTheSameWithAServerAndAlone) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string served = directory_.Path("served.safetensors");
  const std::string alone = directory_.Path("alone.safetensors");
  const Ran first = RunCommand(std::string("compress ") + kCapture + " --server " + address +
                               " --out " + served + " --checksums");
  ASSERT_EQ(first.code, 0) << first.output;
  EXPECT_THAT(first.output, HasSubstr("3.07 MB -> 307 kB (10.0 %)"));
  EXPECT_THAT(first.output, HasSubstr("layer 10 of 12, skeleton of 200 tokens"));
  const Ran second =
      RunCommand(std::string("compress ") + kCapture + " --in-process --json --out " + alone);
  ASSERT_EQ(second.code, 0) << second.output;
  const auto json = nlohmann::json::parse(second.output);
  EXPECT_EQ(json.at("kv_bytes_before"), 3072000);
  EXPECT_EQ(json.at("kv_bytes_after"), 307200);
  EXPECT_EQ(json.at("pivot_layer"), 10);

  const auto a = SafetensorsFile::Open(served);
  const auto b = SafetensorsFile::Open(alone);
  ASSERT_TRUE(a.ok()) << a.status();
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ((*a)->tensors().size(), (*b)->tensors().size());
  for (const auto& [name, info] : (*a)->tensors()) {
    const auto* other = (*b)->Find(name);
    ASSERT_NE(other, nullptr) << name;
    EXPECT_TRUE((*a)->Data(info) == (*b)->Data(*other)) << name;
  }
  for (const char* key :
       {"method", "fingerprint", "logical_length", "kv_length", "method.kv_budget.ratio"}) {
    ASSERT_EQ((*a)->metadata().count(key), 1) << key;
    EXPECT_EQ((*a)->metadata().at(key), (*b)->metadata().at(key)) << key;
  }
  EXPECT_EQ((*a)->metadata().at("logical_length"), "1000");
  EXPECT_EQ((*a)->metadata().at("kv_length"), "100");
}

TEST_F(CommandTest, TurnsKeysToConsecutivePositions) {
  const std::string plain = directory_.Path("plain.safetensors");
  const std::string turned = directory_.Path("turned.safetensors");
  const std::string arguments = std::string("compress ") + kCapture + " --in-process --json --out ";
  ASSERT_EQ(RunCommand(arguments + plain).code, 0);
  const Ran ran = RunCommand(arguments + turned + " --rerotate --rope-scaling linear" +
                             " --rope-factor 2 --rope-pairing interleaved --rotary-dim 16");
  ASSERT_EQ(ran.code, 0) << ran.output;
  EXPECT_EQ(nlohmann::json::parse(ran.output).at("next_position"), 100);
  const auto a = SafetensorsFile::Open(plain);
  const auto b = SafetensorsFile::Open(turned);
  ASSERT_TRUE(a.ok()) << a.status();
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ((*a)->metadata().at("next_position"), "1000");
  EXPECT_EQ((*a)->metadata().count("rotary.rope_theta"), 0);
  const std::map<std::string, std::string> wanted = {
      {"logical_length", "1000"},        {"kv_length", "100"},
      {"next_position", "100"},          {"rotary.rope_theta", "10000"},  // the capture's
      {"rotary.rope_type", "linear"},    {"rotary.factor", "2"},
      {"rotary.pairing", "interleaved"}, {"rotary.rotary_dim", "16"},
  };
  for (const auto& [key, value] : wanted) {
    ASSERT_EQ((*b)->metadata().count(key), 1) << key;
    EXPECT_EQ((*b)->metadata().at(key), value) << key;
  }
  EXPECT_NE((*a)->metadata().at("fingerprint"), (*b)->metadata().at("fingerprint"));
  for (const auto& [name, info] : (*a)->tensors()) {
    const auto* other = (*b)->Find(name);
    ASSERT_NE(other, nullptr) << name;
    const bool key = name.size() > 2 && name.substr(name.size() - 2) == ".k";
    EXPECT_EQ((*a)->Data(info) == (*b)->Data(*other), !key) << name;
  }
  const Ran lost = RunCommand(arguments + plain + " --rope-theta 10000");
  EXPECT_NE(lost.code, 0);
  EXPECT_THAT(lost.output, HasSubstr("--rerotate"));
  const Ran bad = RunCommand(arguments + plain + " --rerotate --rope-scaling yarn --rope-factor 2");
  EXPECT_NE(bad.code, 0);
  EXPECT_THAT(bad.output, HasSubstr("open.rotary.original_max_position_embeddings is not set"));
}

TEST_F(CommandTest, SendsRowsThatAreAskedFor) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string sums = STRUCTKV_TEST_DATA "/column-sums-tiny-llama-1000.safetensors";
  const struct {
    std::string method;
    int not_sent;
  } methods[] = {
      {" --method snapkv", 12 * 900 * 2 * 32 * 2},                         // values
      {" --method h2o --column-sums " + sums, 12 * 2 * 900 * 2 * 32 * 2},  // keys too
      {" --pivot online --pivot-score 0 --skeleton-layers",
       6 * (800 * 2 * 2 * 32 * 2 - 200 * 4) + 6 * 900 * 2 * 32 * 2 + 6 * 100 * 2 * 32 * 2},
  };
  for (const auto& [method, not_sent] : methods) {
    SCOPED_TRACE(method);
    const std::string whole = directory_.Path("whole.safetensors");
    const std::string arguments = std::string("compress ") + kCapture + method + " --json --out ";
    ASSERT_EQ(RunCommand(arguments + whole + " --in-process").code, 0);
    for (const std::string& where : {" --server " + address, std::string(" --in-process")}) {
      const std::string pulled = directory_.Path("pulled.safetensors");
      const Ran ran = RunCommand(arguments + pulled + " --pull" + where);
      ASSERT_EQ(ran.code, 0) << ran.output;
      EXPECT_EQ(nlohmann::json::parse(ran.output).at("input_bytes_not_sent"), not_sent);
      EXPECT_TRUE(Read(pulled) == Read(whole)) << where;
    }
  }
  const Ran text = RunCommand(std::string("compress ") + kCapture + " --in-process --pull --out " +
                              directory_.Path("text.safetensors"));
  EXPECT_THAT(text.output, HasSubstr("the rows of values that stay alone"));
  const Ran full =
      RunCommand(std::string("compress ") + kCapture + " --in-process --method full --pull --out " +
                 directory_.Path("full.safetensors"));
  EXPECT_EQ(full.code, 2);
  EXPECT_THAT(full.output, HasSubstr("open.pull"));
  const Ran bench = RunCommand(
      "bench --geometry tiny-llama --tokens 500 --prompts 1 --pull --json --server " + address);
  ASSERT_EQ(bench.code, 0) << bench.output;
  // Keys, window queries, and 50 rows of values.
  EXPECT_EQ(nlohmann::json::parse(bench.output).at("input_bytes"),
            12 * (500 * 2 * 32 * 2 + 6 * 8 * 32 * 2 + 50 * 2 * 32 * 2));
}

TEST_F(CommandTest, HoldsFetchesAndReleases) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address, "--hold-budget", "64MiB"});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string at = " --server " + address + " --tenant alice";
  const std::string whole = directory_.Path("whole.safetensors");
  const std::string compress = std::string("compress ") + kCapture;
  ASSERT_EQ(RunCommand(compress + " --in-process --out " + whole).code, 0);
  const Ran text = RunCommand(compress + " --hold --hold-lease 90" + at);
  ASSERT_EQ(text.code, 0) << text.output;
  EXPECT_THAT(text.output, HasSubstr("for 1m30s"));
  const Ran held = RunCommand(compress + " --hold --json" + at);
  ASSERT_EQ(held.code, 0) << held.output;
  const auto json = nlohmann::json::parse(held.output);
  EXPECT_EQ(json.at("held_bytes"), 307200 + 12 * 100 * 4);
  EXPECT_EQ(json.at("lease_millis"), 60000);
  EXPECT_EQ(json.count("output"), 0);
  const std::string handle = json.at("handle");

  const std::string fetched = directory_.Path("fetched.safetensors");
  const Ran all = RunCommand("fetch " + handle + " --checksums --to " + fetched + at);
  ASSERT_EQ(all.code, 0) << all.output;
  EXPECT_THAT(all.output, HasSubstr("12 of 12 layers, 2 of 2 KV heads"));
  const std::string part = directory_.Path("part.safetensors");
  const Ran some =
      RunCommand("fetch " + handle + " --layers 2-3 --kv-heads 1 --json --to " + part + at);
  ASSERT_EQ(some.code, 0) << some.output;
  EXPECT_EQ(nlohmann::json::parse(some.output).at("kv_heads"), 1);

  const auto a = SafetensorsFile::Open(whole);
  const auto b = SafetensorsFile::Open(fetched);
  const auto c = SafetensorsFile::Open(part);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok()) << b.status() << c.status();
  size_t layers = 0;
  for (const auto& [name, info] : (*a)->tensors()) {
    if (name == "skeleton.positions" || name == "metrics.transition") continue;
    layers += name.substr(0, 6) == "layer." ? 1 : 0;
    const auto* other = (*b)->Find(name);
    ASSERT_NE(other, nullptr) << name;
    EXPECT_EQ(info.shape, other->shape) << name;
    EXPECT_TRUE((*a)->Data(info) == (*b)->Data(*other)) << name;
  }
  EXPECT_EQ(layers, 36);
  for (const char* key :
       {"method", "fingerprint", "logical_length", "kv_length", "next_position"}) {
    EXPECT_EQ((*a)->metadata().at(key), (*b)->metadata().at(key)) << key;
  }
  EXPECT_EQ((*c)->Find("layer.1.k"), nullptr);
  EXPECT_EQ((*c)->Find("layer.4.k"), nullptr);
  for (const char* name : {"layer.2.k", "layer.3.v"}) {
    const TensorInfo& own = *(*a)->Find(name);
    const TensorInfo* other = (*c)->Find(name);
    ASSERT_NE(other, nullptr) << name;
    // [kv_head, token, dim]: the second head is the second half.
    EXPECT_TRUE((*c)->Data(*other) == (*a)->Data(own).subspan(own.size_bytes() / 2)) << name;
  }

  const Ran stranger = RunCommand("fetch " + handle + " --to " + part + " --server " + address);
  EXPECT_EQ(stranger.code, 2);
  EXPECT_THAT(stranger.output, HasSubstr("NOT_FOUND"));
  EXPECT_EQ(RunCommand("release " + handle + at).code, 0);
  EXPECT_EQ(RunCommand("release " + handle + at).code, 2);
  for (const auto& [arguments, why] :
       {std::pair("fetch xyz --to " + part + at, "32 hexadecimal digits"),
        std::pair("fetch " + handle + " --layers 3-2 --to " + part + at, "--layers is 3-2"),
        std::pair(compress + " --hold --out " + part + at, "--out"),
        std::pair(compress + at, "--out is needed"),
        std::pair(compress + " --hold --in-process", "--in-process"),
        std::pair(compress + " --hold --method gemfilter --filter-layer 5" + at, "gemfilter")}) {
    const Ran refused = RunCommand(arguments);
    EXPECT_EQ(refused.code, 2) << refused.output;
    EXPECT_THAT(refused.output, HasSubstr(why));
  }
}

TEST_F(CommandTest, SendsSkeletonRowsPastThePivot) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string served = directory_.Path("served.safetensors");
  const std::string alone = directory_.Path("alone.safetensors");
  const std::string arguments = std::string("compress ") + kCapture +
                                " --pivot online --pivot-score 0 --skeleton-layers --json --out ";
  const Ran first = RunCommand(arguments + served + " --server " + address);
  ASSERT_EQ(first.code, 0) << first.output;
  const Ran second = RunCommand(arguments + alone + " --in-process");
  ASSERT_EQ(second.code, 0) << second.output;
  for (const Ran& ran : {first, second}) {
    const auto json = nlohmann::json::parse(ran.output);
    EXPECT_EQ(json.at("pivot_mode"), "online");
    EXPECT_EQ(json.at("pivot_layer"), 4);
    EXPECT_EQ(json.at("decided_at_layer"), 5);
    EXPECT_EQ(json.at("skeleton_from_layer"), 6);
    EXPECT_EQ(json.at("skeleton_layers"), 6);
    // Six layers of 800 rows of keys and values, less six times 200 positions.
    EXPECT_EQ(json.at("input_bytes_not_sent"), 6 * (800 * 2 * 2 * 32 * 2 - 200 * 4));
  }
  const auto a = SafetensorsFile::Open(served);
  const auto b = SafetensorsFile::Open(alone);
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  for (const auto& [name, info] : (*a)->tensors()) {
    const auto* other = (*b)->Find(name);
    ASSERT_NE(other, nullptr) << name;
    EXPECT_TRUE((*a)->Data(info) == (*b)->Data(*other)) << name;
  }
  const std::string svg = directory_.Path("plot.svg");
  EXPECT_EQ(RunCommand("plot " + served + " --out " + svg).code, 0);
  EXPECT_THAT(Read(svg), HasSubstr("decided online at layer 5"));
  EXPECT_THAT(RunCommand("info " + served).output, HasSubstr("skeleton_from_layer"));
  const Ran fastkv = RunCommand(std::string("compress ") + kCapture +
                                " --in-process --method fastkv --tsp-layer 5 --skeleton-layers "
                                "--json --out " +
                                alone);
  ASSERT_EQ(fastkv.code, 0) << fastkv.output;
  const auto json = nlohmann::json::parse(fastkv.output);
  EXPECT_EQ(json.at("skeleton_from_layer"), 6);
  EXPECT_EQ(json.at("skeleton_layers"), 6);
  const Ran exact = RunCommand(std::string("compress ") + kCapture +
                               " --in-process --skeleton-layers --out " + alone);
  EXPECT_EQ(exact.code, 2);
  EXPECT_THAT(exact.output, HasSubstr("--pivot online"));
  const Ran large = RunCommand(std::string("compress ") + kCapture +
                               " --in-process --pivot online --skeleton-layers --kv-budget 0.3 "
                               "--out " +
                               alone);
  EXPECT_EQ(large.code, 2);
  EXPECT_THAT(large.output, HasSubstr("skeleton has 200"));
}

// Every method and mode that has a picture of its own to tell.
TEST_F(CommandTest, PlotKnowsEveryMethodAndMode) {
  const std::string cache = directory_.Path("cache.safetensors");
  const std::string svg = directory_.Path("plot.svg");
  const std::pair<std::string, std::string> methods[] = {
      {"structkv", "Pivot L* at layer 10; highest transition score at layer 9"},
      {"structkv --pivot online", "Pivot L* at layer 10, decided online at layer 9; highest"},
      {"structkv --pivot fixed --pivot-layer 5", "Pivot L* at layer 5, as given; skeleton of 200"},
      {"structkv --plan", "100 of 1,000 tokens kept in each of 12 layers"},
      {"snapkv", "Each of 2 KV heads keeps its own tokens"},
      {"pyramidkv", "35 to 165 of 1,000 tokens kept"},
      {"fastkv --tsp-layer 5", "Pivot L* at layer 5, as given; skeleton of 200 tokens"},
      {"gemfilter --filter-layer 4", "Chosen at layer 4 for all layers"},
      {"h2o --column-sums " STRUCTKV_TEST_DATA "/column-sums-tiny-llama-1000.safetensors",
       "Each of 2 KV heads"},
      {"streaming_llm", "100 of 1,000 tokens kept"},
      {"full", "1,000 of 1,000 tokens kept"}};
  for (const auto& [method, text] : methods) {
    SCOPED_TRACE(method);
    const Ran ran = RunCommand(std::string("compress ") + kCapture + " --in-process --method " +
                               method + " --out " + cache);
    ASSERT_EQ(ran.code, 0) << ran.output;
    ASSERT_EQ(RunCommand("plot " + cache + " --out " + svg).code, 0);
    const std::string picture = Read(svg);
    EXPECT_THAT(picture, HasSubstr(text));
    EXPECT_THAT(picture, HasSubstr("token position in the prompt"));
  }
}

TEST_F(CommandTest, CompareDrawsItsRows) {
  const std::string svg = directory_.Path("compare.svg");
  const Ran ran = RunCommand(std::string("compare ") + kCapture +
                             " --in-process --methods structkv,gemfilter,full --json --out " + svg);
  ASSERT_EQ(ran.code, 0) << ran.output;
  const auto json = nlohmann::json::parse(ran.output);
  const auto& methods = json.at("methods");
  ASSERT_EQ(methods.size(), 3U);
  EXPECT_EQ(methods[0].at("kept_too_by").at("full"), 1.0);
  EXPECT_DOUBLE_EQ(methods[2].at("kept_too_by").at("structkv"), 0.1);
  const std::string picture = Read(svg);
  EXPECT_THAT(picture, HasSubstr("3 methods on tiny-llama: 10.0 % of 1,000 tokens kept"));
  EXPECT_THAT(picture, HasSubstr(">no cache to measure<"));
  EXPECT_THAT(picture, HasSubstr(">307 kB<"));
  EXPECT_THAT(picture, HasSubstr(">3.07 MB<"));
  EXPECT_THAT(picture, HasSubstr(">59.4 %, worst 96.8 %<"));
  const Ran refused =
      RunCommand(std::string("compare ") + kCapture + " --in-process --methods full --out " +
                 directory_.Path("none/compare.svg"));
  EXPECT_NE(refused.code, 0);
  EXPECT_THAT(refused.output, HasSubstr("cannot create"));
}

TEST_F(CommandTest, InfoAndPlotReadWhatCompressWrote) {
  const std::string out = directory_.Path("out.safetensors");
  const std::string svg = directory_.Path("plot.svg");
  ASSERT_EQ(RunCommand(std::string("compress ") + kCapture + " --in-process --out " + out).code, 0);
  const Ran info = RunCommand("info " + out);
  EXPECT_EQ(info.code, 0) << info.output;
  EXPECT_THAT(info.output, HasSubstr("compacted cache"));
  EXPECT_THAT(info.output, HasSubstr("fingerprint"));
  EXPECT_THAT(RunCommand(std::string("info ") + kCapture).output, HasSubstr("captured prefill"));
  const Ran plot = RunCommand("plot " + out + " --out " + svg);
  EXPECT_EQ(plot.code, 0) << plot.output;
  const std::string drawn = Read(svg);
  EXPECT_THAT(drawn, HasSubstr("<svg"));
  for (const char* part : {"Entropy", "Sparsity", "Variance", "Transition score", "L* 10"}) {
    EXPECT_THAT(drawn, HasSubstr(part));
  }
}

// There are no sessions and no memory budget without a server.
TEST_F(CommandTest, InfoSaysWhatThisProcessCanDo) {
  const Ran info = RunCommand("info --in-process");
  EXPECT_EQ(info.code, 0) << info.output;
  EXPECT_THAT(info.output, HasSubstr("512 layers, 1,024 heads, window of 64\n"));
  EXPECT_THAT(info.output, ::testing::Not(HasSubstr("sessions")));
  EXPECT_THAT(info.output, ::testing::Not(HasSubstr("memory")));
}

TEST_F(CommandTest, ComparesTheMethods) {
  const Ran ran = RunCommand(std::string("compare ") + kCapture + " --in-process");
  EXPECT_EQ(ran.code, 0) << ran.output;
  for (const char* part : {"structkv", "snapkv", "streaming_llm", "full", "307,200", "layer 10"}) {
    EXPECT_THAT(ran.output, HasSubstr(part));
  }
}

constexpr char kColumnSums[] = STRUCTKV_TEST_DATA "/column-sums-tiny-llama-1000.safetensors";

TEST_F(CommandTest, ComparesEveryMethodGivenTheColumnSums) {
  const Ran ran = RunCommand(std::string("compare ") + kCapture + " --in-process --json" +
                             " --column-sums " + kColumnSums);
  ASSERT_EQ(ran.code, 0) << ran.output;
  const auto json = nlohmann::json::parse(ran.output);
  std::vector<std::string> names;
  for (const auto& method : json.at("methods")) {
    const std::string name = method.at("method");
    names.push_back(name);
    EXPECT_EQ(method.at("kv_bytes_after"), name == "full" ? 3072000 : 307200) << name;
    EXPECT_EQ(method.contains("error_mean"), name != "gemfilter") << name;
    const double overlap = method.at("overlap_with_structkv");
    if (name == "structkv" || name == "full") {
      EXPECT_EQ(overlap, 1) << name;
    } else {
      EXPECT_GT(overlap, 0.1) << name;
      EXPECT_LT(overlap, 1) << name;
    }
    if (name == "pyramidkv") {
      EXPECT_EQ(method.at("kept_tokens"), 165);
      EXPECT_EQ(method.at("least_kept_tokens"), 35);
    }
  }
  EXPECT_THAT(names, ::testing::ElementsAre("structkv", "snapkv", "pyramidkv", "fastkv",
                                            "gemfilter", "h2o", "streaming_llm", "full"));
  const Ran without = RunCommand(std::string("compare ") + kCapture + " --in-process");
  EXPECT_EQ(without.code, 0) << without.output;
  EXPECT_THAT(without.output, HasSubstr("h2o was left out"));
}

// Every method over the service, and its file drawn.
TEST_F(CommandTest, EveryMethodIsServedAndPlotted) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string out = directory_.Path("out.safetensors");
  const std::string svg = directory_.Path("plot.svg");
  for (const auto& [flags, title] : std::vector<std::pair<std::string, std::string>>{
           {"snapkv --window-reduce max --group-reduce mean", "snapkv on tiny-llama: 100 of 1,000"},
           {"snapkv --group-reduce max", "snapkv on tiny-llama: 100 of 1,000"},
           {"pyramidkv --beta 10", "pyramidkv on tiny-llama: 38 to 162 of 1,000"},
           {"fastkv --tsp-layer 6 --saliency", "fastkv on tiny-llama: 100 of 1,000"},
           {"gemfilter --filter-layer 5 --saliency", "gemfilter on tiny-llama: 100 of 1,000"},
           {std::string("h2o --recent-share 0.2 --column-sums ") + kColumnSums,
            "h2o on tiny-llama: 100 of 1,000"},
           {"streaming_llm --sinks 2", "streaming_llm on tiny-llama: 100 of 1,000"},
           // A plan for which no layer has anything to send.
           {"streaming_llm --plan", "streaming_llm on tiny-llama: 100 of 1,000"}}) {
    const Ran ran = RunCommand(std::string("compress ") + kCapture + " --server " + address +
                               " --out " + out + " --method " + flags);
    ASSERT_EQ(ran.code, 0) << ran.output;
    const Ran plot = RunCommand("plot " + out + " --out " + svg);
    ASSERT_EQ(plot.code, 0) << plot.output;
    EXPECT_THAT(Read(svg), HasSubstr(title)) << flags;
  }
}

TEST_F(CommandTest, RefusesFlagsThatAMethodDoesNotHave) {
  const std::string run = std::string("compress ") + kCapture + " --in-process --out " +
                          directory_.Path("out.safetensors") + " --method ";
  EXPECT_THAT(RunCommand(run + "snapkv --beta 3").output,
              HasSubstr("--beta is no parameter of the method snapkv"));
  EXPECT_THAT(RunCommand(run + "h2o --window 3").output,
              HasSubstr("--window is no parameter of the method h2o"));
  EXPECT_THAT(RunCommand(run + "h2o").output, HasSubstr("no column_sums"));
  EXPECT_THAT(RunCommand(run + "fastkv").output, HasSubstr("--tsp-layer: fastkv needs"));
  EXPECT_THAT(RunCommand(run + "gemfilter --granularity per-layer").output,
              HasSubstr("--granularity is no parameter of the method gemfilter"));
  EXPECT_THAT(RunCommand(run + "h2o --column-sums " + kCapture).output,
              HasSubstr("layer.0.column_sums' is missing"));
}

// A run that is interrupted leaves nothing, and what had the output's name before untouched.
TEST_F(CommandTest, AnInterruptedRunLeavesNothing) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string out = directory_.Path("out.safetensors");
  std::ofstream(out) << "before";
  server.Signal(SIGSTOP);  // so that the command waits, with its output open or about to be
  {
    testkit::Process command({STRUCTKV_COMMAND, "compress", kCapture, "--server", address, "--out",
                              out, "--method", "full"});
    EXPECT_FALSE(command.Wait(std::chrono::milliseconds(300)).has_value());
    command.Signal(SIGINT);
    EXPECT_EQ(command.Wait(), 128 + SIGINT);
  }
  server.Signal(SIGCONT);
  EXPECT_EQ(Read(out), "before");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.Path("."))) {
    files += entry.is_regular_file() ? 1 : 0;
  }
  EXPECT_EQ(files, 1U);
}

TEST_F(CommandTest, SaysWhatIsWrong) {
  const std::string out = directory_.Path("out.safetensors");
  const Ran missing = RunCommand("compress /nowhere.safetensors --in-process --out " + out);
  EXPECT_NE(missing.code, 0);
  EXPECT_THAT(missing.output, HasSubstr("/nowhere.safetensors"));
  const Ran budget =
      RunCommand(std::string("compress ") + kCapture + " --in-process --kv-budget 2 --out " + out);
  EXPECT_NE(budget.code, 0);
  EXPECT_THAT(budget.output, HasSubstr("ratio"));
  const Ran server = RunCommand(std::string("compress ") + kCapture + " --server unix:" +
                                directory_.Path("nobody") + " --timeout 2 --out " + out);
  EXPECT_NE(server.code, 0);
  EXPECT_THAT(server.output, HasSubstr("nobody"));
  EXPECT_FALSE(std::filesystem::exists(out)) << "a failed run leaves no output";

  // What is there already and must not be lost.
  const std::string capture = directory_.Path("capture.safetensors");
  std::filesystem::copy(kCapture, capture);
  const std::string link = directory_.Path("link.safetensors");
  std::filesystem::create_symlink(capture, link);
  for (const std::string& command : {"compress " + capture + " --in-process --out " + link,
                                     "compare " + link + " --in-process --out " + capture}) {
    const Ran ran = RunCommand(command);
    EXPECT_NE(ran.code, 0) << command;
    EXPECT_THAT(ran.output, HasSubstr("is the input"));
  }
  EXPECT_TRUE(Read(capture) == Read(kCapture));
  const Ran folder =
      RunCommand("compress " + capture + " --in-process --out " + directory_.Path("."));
  EXPECT_NE(folder.code, 0);
  EXPECT_THAT(folder.output, HasSubstr("no regular file"));
  for (const char* method : {"fastkv", "gemfilter"}) {
    const Ran layer =
        RunCommand("compress " + capture + " --in-process --method " + method + " --out " + out);
    EXPECT_NE(layer.code, 0);
    EXPECT_THAT(layer.output, HasSubstr("-layer: " + std::string(method) + " needs"));
  }

  // A file that was cut in the middle, or whose header is not JSON.
  const std::string whole = Read(kCapture);
  const std::string bad = directory_.Path("bad.safetensors");
  for (const std::string& bytes :
       {whole.substr(0, whole.size() / 2), whole.substr(0, 7), std::string(8, '\xff') + whole,
        whole.substr(0, 8) + "x" + whole.substr(9)}) {
    std::ofstream(bad, std::ios::binary) << bytes;
    const Ran ran = RunCommand("compress " + bad + " --in-process --out " + out);
    EXPECT_NE(ran.code, 0);
    EXPECT_THAT(ran.output, HasSubstr("bad.safetensors"));
  }
}

}  // namespace
}  // namespace structkv::cli

// Streams that break the order of messages, disagree with themselves, or are no messages at all.
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using Messages = std::vector<v1::CompressRequest>;

struct StreamCase {
  std::string name;
  std::function<Messages(const PromptData&)> make;
  std::vector<std::string> texts;
};

void PrintTo(const StreamCase& stream_case, std::ostream* out) { *out << stream_case.name; }

class BadStreamTest : public ServiceTest, public ::testing::WithParamInterface<StreamCase> {};

// All are sent in one go, followed by the half-close.
TEST_P(BadStreamTest, IsInvalid) {
  Start();
  const PromptData data(SmallOpen(200), 1);
  ExpectFailure(Run(GetParam().make(data)), grpc::StatusCode::INVALID_ARGUMENT, GetParam().texts);
}

// A good prompt whose commit is another one.
StreamCase WithCommit(const std::string& name,
                      std::function<v1::CompressRequest(const PromptData&)> commit,
                      const std::string& field) {
  return {name,
          [=](const PromptData& data) {
            Messages messages = AllMessages(data);
            messages.back() = commit(data);
            return messages;
          },
          {"commit", field}};
}

// A good prompt with something after its commit.
StreamCase AfterCommit(const std::string& name,
                       std::function<v1::CompressRequest(const PromptData&)> last) {
  return {name,
          [=](const PromptData& data) {
            Messages messages = AllMessages(data);
            messages.push_back(last(data));
            return messages;
          },
          {"commit"}};
}

// The first `count` messages of a good prompt.
StreamCase CutShort(const std::string& name, size_t count, const std::string& text) {
  return {name,
          [=](const PromptData& data) {
            Messages messages = AllMessages(data);
            messages.resize(count);
            return messages;
          },
          {text}};
}

std::vector<StreamCase> Cases() {
  return {
      CutShort("Empty", 0, "open"),
      CutShort("OpenAlone", 1, "commit"),
      CutShort("EndsWithinTheLayers", 3, "commit"),
      CutShort("NoCommit", 5, "commit"),
      {"EndsWithinALayer",
       [](const PromptData& data) {
         return Messages{OpenMessage(data.open()), LayerMessage(data, 0),
                         PieceMessage(MakePiece(data, 1, v1::TENSOR_KEYS, 0, 64))};
       },
       {"commit"}},
      {"PieceBeforeOpen",
       [](const PromptData& data) { return Messages{LayerMessage(data, 0)}; },
       {"pieces", "open"}},
      {"CommitBeforeOpen",
       [](const PromptData& data) { return Messages{CommitMessage(data)}; },
       {"commit", "open"}},
      {"NothingSet", [](const PromptData&) { return Messages{v1::CompressRequest()}; }, {"open"}},
      {"NothingSetAfterOpen",
       [](const PromptData& data) {
         return Messages{OpenMessage(data.open()), v1::CompressRequest()};
       },
       {"open", "pieces", "commit"}},
      {"TwoOpens",
       [](const PromptData& data) {
         return Messages{OpenMessage(data.open()), OpenMessage(data.open())};
       },
       {"open"}},
      {"OpenWithinTheLayers",
       [](const PromptData& data) {
         return Messages{OpenMessage(data.open()), LayerMessage(data, 0), OpenMessage(data.open())};
       },
       {"open"}},
      {"LayerMissing",
       [](const PromptData& data) {
         Messages messages = AllMessages(data);
         messages.erase(messages.begin() + 4);  // layer 3
         return messages;
       },
       {"layer 3"}},
      {"FirstLayerMissing",
       [](const PromptData& data) {
         // Both remaining layers in flight are sent, then the commit.
         return Messages{OpenMessage(data.open()), LayerMessage(data, 1), CommitMessage(data)};
       },
       {"layer 0"}},
      {"TensorMissing",
       [](const PromptData& data) {
         Messages messages = AllMessages(data);
         messages[4].mutable_pieces()->mutable_pieces()->DeleteSubrange(1, 1);  // values
         return messages;
       },
       {"layer 3", "values"}},
      {"LayerHalfSent",
       [](const PromptData& data) {
         Messages messages = AllMessages(data);
         *messages[4].mutable_pieces()->mutable_pieces(0) =
             MakePiece(data, 3, v1::TENSOR_KEYS, 0, 12800);
         return messages;
       },
       {"layer 3", "keys"}},
      {"HoleInATensor",
       [](const PromptData& data) {
         Messages messages = AllMessages(data);
         v1::TensorPieces* pieces = messages[4].mutable_pieces();
         *pieces->mutable_pieces(0) = MakePiece(data, 3, v1::TENSOR_KEYS, 0, 100);
         *pieces->add_pieces() = MakePiece(data, 3, v1::TENSOR_KEYS, 101, 25600 - 101);
         return messages;
       },
       {"layer 3", "keys"}},
      WithCommit(
          "CommitOfFewerLayers",
          [](const PromptData& data) { return CommitMessage(3, data.total_bytes()); },
          "layer_count"),
      WithCommit(
          "CommitOfMoreLayers",
          [](const PromptData& data) { return CommitMessage(5, data.total_bytes()); },
          "layer_count"),
      WithCommit(
          "CommitOfNoLayers",
          [](const PromptData& data) { return CommitMessage(0, data.total_bytes()); },
          "layer_count"),
      WithCommit(
          "CommitOfMostLayers",
          [](const PromptData& data) { return CommitMessage(0xffffffff, data.total_bytes()); },
          "layer_count"),
      WithCommit(
          "CommitOfFewerBytes",
          [](const PromptData& data) { return CommitMessage(4, data.total_bytes() - 1); },
          "input_bytes"),
      WithCommit(
          "CommitOfMoreBytes",
          [](const PromptData& data) { return CommitMessage(4, data.total_bytes() + 1); },
          "input_bytes"),
      WithCommit(
          "CommitOfNoBytes", [](const PromptData&) { return CommitMessage(4, 0); }, "input_bytes"),
      WithCommit(
          "CommitOfMostBytes", [](const PromptData&) { return CommitMessage(4, ~uint64_t{0}); },
          "input_bytes"),
      AfterCommit("TwoCommits", [](const PromptData& data) { return CommitMessage(data); }),
      AfterCommit("PieceAfterCommit", [](const PromptData& data) { return LayerMessage(data, 3); }),
      AfterCommit("OpenAfterCommit",
                  [](const PromptData& data) { return OpenMessage(data.open()); }),
      AfterCommit("NothingSetAfterCommit", [](const PromptData&) { return v1::CompressRequest(); }),
  };
}

INSTANTIATE_TEST_SUITE_P(, BadStreamTest, ::testing::ValuesIn(Cases()),
                         [](const auto& instance) { return instance.param.name; });

class GarbageTest : public ServiceTest {
 protected:
  // Sends `open`, if asked to, and then the bytes.
  Outcome Send(bool open_first, const std::string& bytes) {
    Call call(channel());
    if (open_first) {
      call.Send(OpenMessage(SmallOpen()));
      EXPECT_TRUE(call.WaitForOpened().has_value());
    }
    call.SendBytes(bytes);
    return call.Finish();  // without a half-close: the server must not wait for one
  }
};

TEST_F(GarbageTest, BytesThatAreNoMessage) {
  Start();
  Random random(11);
  std::string noise;
  for (int i = 0; i < 1000; ++i) noise.push_back(static_cast<char>(random.Next()));
  const PromptData data(SmallOpen(), 1);
  const std::string good = LayerMessage(data, 0).SerializeAsString();
  for (const std::string& bytes : {
           std::string("GET / HTTP/1.1\r\n"), std::string(100, '\xff'), noise,
           std::string("\x0a"),                      // a field without its length
           std::string("\x0a\xff\xff\xff\xff\x0f"),  // a length of 4 GiB
           std::string("\x12\x02\x0a\x05xx", 6),     // a piece longer than its message
           good.substr(0, good.size() - 1),          // cut off
           good.substr(1),                           // its head lost
       }) {
    for (const bool open_first : {false, true}) {
      ExpectFailure(Send(open_first, bytes), grpc::StatusCode::INVALID_ARGUMENT, {});
    }
  }
  ExpectMemoryBack();
}

TEST_F(GarbageTest, TextThatIsNoUtf8) {
  Start();
  v1::Open open = SmallOpen();
  open.set_idempotency_key("\xff\xfe");
  ExpectFailure(Run({OpenMessage(open)}), grpc::StatusCode::INVALID_ARGUMENT, {});
}

// Later versions may send fields that this server does not know.
TEST_F(GarbageTest, UnknownFieldsAreSkipped) {
  Start();
  const PromptData data(SmallOpen(), 1);
  // Field 500: a varint, a length-delimited one and a fixed32.
  const std::string unknown("\xa0\x1f\x07\xa2\x1f\x03xyz\xa5\x1f\x01\x02\x03\x04", 15);
  Call call(channel());
  for (const v1::CompressRequest& message : AllMessages(data)) {
    call.SendBytes(unknown + message.SerializeAsString() + unknown);
  }
  call.HalfClose();
  ExpectSuccess(data, call.Finish());
}

// Any bytes of a good stream changed, cut or repeated: an error, or the untouched result.
TEST_F(GarbageTest, DamagedStreamsNeverSucceedWrongly) {
  Start();
  v1::Open open = SmallOpen(40);
  open.set_statistic(v1::STATISTIC_SALIENCY);
  const PromptData data(open, 9);
  const std::string undamaged = ResultBytes(Assemble(Run(AllMessages(data))));
  const uint64_t seed = 20240611;
  Random random(seed);
  int failed = 0;
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> messages;
    for (v1::CompressRequest message : AllMessages(data)) {
      messages.push_back(message.SerializeAsString());
    }
    const size_t damaged = random.Between(0, 5);
    std::string& target = messages[damaged];
    // The envelope: the first bytes of a message, never the tensors themselves.
    const auto at = static_cast<size_t>(
        random.Between(0, std::min<int64_t>(11, static_cast<int64_t>(target.size()) - 1)));
    switch (random.Between(0, 2)) {
      case 0:
        target[at] = static_cast<char>(random.Next());
        break;
      case 1:
        target.erase(at, 1);
        break;
      default:
        target.insert(at, 1, static_cast<char>(random.Next()));
        break;
    }
    CallOptions options;
    options.deadline = std::chrono::seconds(10);
    Call call(channel(), options);
    for (const std::string& message : messages) call.SendBytes(message);
    call.HalfClose();
    const Outcome outcome = call.Finish();
    if (outcome.status.ok()) {
      const Answer answer = Assemble(outcome);
      EXPECT_THAT(answer.faults, ::testing::IsEmpty()) << "seed " << seed << ", round " << round;
      // A changed `open` may ask for something else.
      if (damaged > 0) {
        EXPECT_TRUE(ResultBytes(answer) == undamaged) << "seed " << seed << ", round " << round;
      }
    } else {
      ++failed;
      EXPECT_THAT(outcome.status.error_code(), ::testing::AnyOf(grpc::StatusCode::INVALID_ARGUMENT,
                                                                grpc::StatusCode::OUT_OF_RANGE,
                                                                grpc::StatusCode::ALREADY_EXISTS))
          << "seed " << seed << ", round " << round << ": " << outcome.status.error_message();
    }
  }
  EXPECT_GT(failed, 100);
  EXPECT_EQ(ResultBytes(Assemble(Run(AllMessages(data)))), undamaged);
  ExpectMemoryBack();
}

class EnvelopeTest : public ServiceTest {};

TEST_F(EnvelopeTest, MessageAboveTheLimit) {
  ServerOptions options = TestOptions();
  options.streams.max_message_bytes = 64 << 10;
  StartAlone(options);
  v1::Open open = SmallOpen(4000);
  const PromptData data(open, 1);
  Call call(channel());
  call.Send(OpenMessage(open));
  const std::optional<v1::Opened> opened = call.WaitForOpened();
  ASSERT_TRUE(opened.has_value());
  EXPECT_EQ(opened->max_request_message_bytes(), 64U << 10);
  call.Send(LayerMessage(data, 0));
  ExpectFailure(call.Finish(), grpc::StatusCode::RESOURCE_EXHAUSTED, {"65536"});
}

TEST_F(EnvelopeTest, CompressedMessage) {
  Start();
  const PromptData data(SmallOpen(), 1);
  for (const grpc_compression_algorithm algorithm : {GRPC_COMPRESS_GZIP, GRPC_COMPRESS_DEFLATE}) {
    CallOptions options;
    options.compression = algorithm;
    ExpectFailure(Run(AllMessages(data), options), grpc::StatusCode::UNIMPLEMENTED, {"ompress"});
  }
}

TEST_F(EnvelopeTest, UnknownMethod) {
  Start();
  for (const char* method :
       {"/structkv.v1.Compression/Decompress", "/structkv.v2.Compression/Compress"}) {
    CallOptions options;
    options.method = method;
    ExpectFailure(Run({OpenMessage(SmallOpen())}, options), grpc::StatusCode::UNIMPLEMENTED, {});
  }
}

}  // namespace
}  // namespace structkv::testkit

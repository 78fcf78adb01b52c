#include "tests/session/session_driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/backend_registry.h"
#include "service/engine/query_heads.h"
#include "service/session/session_plan.h"
#include "structkv/v1/piece_codec.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::session {
namespace {

using engine::InputTensor;

// Often a pivot in mid-prefill, so that layers may come as skeleton rows.
void ChoosePivot(testkit::Random* random, v1::Open* open) {
  const testkit::Effective effective(*open);
  const int64_t layers = open->geometry().layer_count();
  const auto layer = static_cast<uint32_t>(random->Between(0, layers - 1));
  const bool one_vector = effective.statistic == v1::STATISTIC_SALIENCY;
  if (!effective.structkv || random->Chance(30)) return;
  if (!one_vector && random->Chance(30)) {
    open->set_return_centrality(false);
    open->mutable_method()->mutable_fastkv()->set_tsp_layer(layer);
    return;
  }
  v1::Pivot* pivot = open->mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->clear_fixed_layer();
  if (random->Chance(50)) {
    pivot->set_mode(v1::PIVOT_MODE_FIXED);
    pivot->set_fixed_layer(layer);
  } else {
    pivot->set_mode(v1::PIVOT_MODE_ONLINE);
    pivot->set_patience(1);
    pivot->set_confirm_score(0);
  }
}

v1::Open RandomOpen(uint32_t tokens, testkit::Random* random) {
  const std::vector<testkit::PromptCase>& cases = testkit::PromptCases();
  v1::Open open;
  do {
    const auto last = static_cast<int64_t>(cases.size()) - 1;
    open = cases[static_cast<size_t>(random->Between(0, last))].open;
  } while (open.geometry().key_dim() > 64);  // the latent one is slow, and adds nothing here
  open.set_prompt_tokens(tokens);
  if (open.has_paged()) {
    testkit::PageAtRandom(open.paged().block_tokens(), /*spare=*/1, random->Next(), &open);
  }
  ChoosePivot(random, &open);
  // With a log-sum-exp it would be slow: the data are made for it row by row.
  const bool queries = testkit::Effective(open).statistic == v1::STATISTIC_WINDOW_QUERIES;
  if (queries && !open.window_lse() && random->Chance(60)) MakeLarge(&open);
  return open;
}

// Puts a NaN where the layer's statistics show it.
void Spoil(testkit::PromptData* data, uint32_t layer) {
  const bool given = !data->tensor(layer, v1::TENSOR_SALIENCY).empty();
  const v1::Tensor tensor = given ? v1::TENSOR_SALIENCY : v1::TENSOR_KEYS;
  const uint64_t row = given ? 0 : data->RowIndex(layer, 0, 0) * data->open().geometry().key_dim();
  testkit::SetElement(given ? v1::DTYPE_F32 : data->open().dtype(), std::nanf(""), row + 7,
                      data->mutable_tensor(layer, tensor));
}

// Sometimes what the worker keeps until it is asked for it, where that is allowed.
engine::Pull RandomPull(engine::PromptSpec spec, testkit::Random* random) {
  spec.pull = random->Chance(50) ? engine::Pull::kValues : engine::Pull::kKeysAndValues;
  const std::unique_ptr<Backend> backend = *CreateBackend("auto");
  const bool allowed = engine::ValidateSpec(spec, {}, backend->capabilities()).ok();
  return allowed && random->Chance(50) ? spec.pull : engine::Pull::kNone;
}

testkit::Answer Direct(const testkit::PromptData& data, const Backend& backend) {
  engine::BufferPool pool(0);
  absl::StatusOr<testkit::Answer> direct =
      testkit::CompressDirectly(data, backend, &pool, testkit::InOrder(data.layers()), SerialFor);
  EXPECT_TRUE(direct.ok()) << direct.status();
  return direct.ok() ? *std::move(direct) : testkit::Answer();
}

int64_t OutputBytes(const testkit::LayerAnswer& layer) {
  size_t bytes = 0;
  for (const auto& [tensor, data] : layer.tensors) bytes += data.size();
  return static_cast<int64_t>(bytes);
}

}  // namespace

Scenario::Scenario(uint32_t tokens, testkit::Random* random, const Backend& backend)
    : sent(RandomOpen(tokens, random), random->Next()) {
  request.spec = testkit::SpecOf(sent.open());
  const engine::PromptSpec& spec = request.spec;
  const int64_t layers = spec.geometry.layers;
  request.layers_in_flight = random->Between(1, layers);
  request.max_message_bytes = random->Between(0, 1) << 16;
  request.spec.pull = RandomPull(spec, random);
  const absl::StatusOr<SessionPlan> plan = PlanSession(request, backend);
  model.spec = spec;
  model.layers_in_flight = request.layers_in_flight;
  model.layer_output_bytes = plan->layer_output_bytes;
  model.output_limit_bytes = plan->output_limit_bytes;
  model.pivot_bytes = plan->output_limit_bytes - (pulls() ? 3 : 2) * plan->layer_output_bytes;
  const bool scores = spec.method.needs_statistics();
  const bool gathers = !spec.plan_only && spec.kept_tokens(0) < spec.prompt_tokens;
  model.gate_holds = plan->layer_size != LayerSize::kSmall && (scores || gathers);
  expected = Direct(sent, backend);
  CutLayers(random);
  expected = Direct(sent, backend);
  for (const auto& [layer, answer] : expected.layers) {
    model.output_bytes.push_back(OutputBytes(answer));
    model.kept_tokens.push_back(answer.kept_tokens);
    const auto positions = answer.tensors.find(v1::TENSOR_POSITIONS);
    model.pull_bytes.push_back(
        positions == answer.tensors.end() ? 0 : static_cast<int64_t>(positions->second.size()));
  }
  calm = random->Chance(60);
  if (!calm && scores && random->Chance(20)) {
    const int64_t bad = random->Between(0, layers - 1);
    Spoil(&sent, static_cast<uint32_t>(bad));
    model.bad_layers[bad] = absl::StatusCode::kInvalidArgument;
  } else if (!calm && spec.statistic == engine::Statistic::kWindowQueries && random->Chance(20)) {
    model.failing_call = failing_call = random->Between(0, layers - 1);
  }
}

// Has the worker send skeleton rows for some of the layers past the pivot.
void Scenario::CutLayers(testkit::Random* random) {
  if (!expected.pivot.has_value()) return;
  const v1::PivotDecision& decision = expected.pivot->decision;
  model.decided_at = decision.decided_at_layer();
  model.decided_by_one_layer = request.spec.method.skeleton_layer().has_value();
  if (!decision.has_skeleton_from_layer()) return;
  model.skeleton_from = decision.skeleton_from_layer();
  model.skeleton = testkit::AsInts(expected.pivot->tensors.at(v1::TENSOR_SKELETON_POSITIONS));
  for (uint32_t layer = decision.skeleton_from_layer(); layer < sent.layers(); ++layer) {
    if (!random->Chance(70)) continue;
    sent.KeepRows(layer, model.skeleton);
    ++cut_layers;
  }
}

SessionDriver::SessionDriver(const Scenario& scenario, std::shared_ptr<Session> session,
                             std::shared_ptr<Faults> faults, testkit::Random* random)
    : scenario_(scenario),
      session_(std::move(session)),
      reserved_bytes_(session_->reserved_bytes()),
      faults_(std::move(faults)),
      random_(*random),
      model_(scenario.model) {
  const engine::PromptSpec& spec = scenario.request.spec;
  const int64_t tokens = spec.prompt_tokens;
  const bool fails = scenario.failing_call.has_value();
  const int64_t calls_of_layer = engine::TellsQueryHeadsApart(spec) ? spec.geometry.kv_heads : 1;
  faults_->OpenGate(tokens);  // one before it may have left it closed
  faults_->FailSaliency(tokens, scenario.failing_call.value_or(0) * calls_of_layer,
                        fails ? absl::InternalError("the device is on fire") : absl::OkStatus());
  CutTensors();
  absl::StrAppend(&log_, "start, layers in flight ", scenario.request.layers_in_flight,
                  scenario.calm ? ", calm" : "", "; ");
  model_.Start();
  session_->Start(probe_->Callbacks());
  Check();
}

void SessionDriver::CutTensors() {
  const engine::PromptSpec& spec = scenario_.request.spec;
  for (int64_t layer = 0; layer < spec.geometry.layers; ++layer) {
    std::vector<InputTensor> tensors = spec.RequiredTensors();
    if (IsCut(layer)) tensors.push_back(InputTensor::kPositions);
    for (const InputTensor tensor : tensors) {
      CutTensor(layer, tensor,
                IsCut(layer) ? spec.SkeletonInputBytes(tensor) : spec.InputBytes(tensor));
    }
  }
}

void SessionDriver::CutTensor(int64_t layer, InputTensor tensor, int64_t size) {
  std::vector<int64_t> ends = {size};
  const int64_t cuts = random_.Between(0, 2);
  for (int64_t i = 0; i < cuts; ++i) ends.push_back(random_.Between(1, size));
  std::sort(ends.begin(), ends.end());
  int64_t begin = 0;
  for (const int64_t end : ends) {
    if (end > begin) unsent_cuts_.push_back({layer, tensor, begin, end - begin});
    begin = end;
  }
}

// The rows that were asked for since.
void SessionDriver::CutPulled() {
  const engine::PromptSpec& spec = scenario_.request.spec;
  for (; cut_pulls_ < model_.pulls().size(); ++cut_pulls_) {
    const uint32_t layer = model_.pulls()[cut_pulls_];
    for (const InputTensor tensor : {InputTensor::kKeys, InputTensor::kValues}) {
      const int64_t size = spec.PulledBytes(tensor, scenario_.model.kept_tokens[layer]);
      if (size > 0) CutTensor(layer, tensor, size);
    }
  }
}

bool SessionDriver::IsCut(int64_t layer) const {
  return !scenario_.sent.rows(static_cast<uint32_t>(layer)).empty();
}

// Skeleton rows only once the pivot is known, and their positions before all else.
bool SessionDriver::MayBeSent(const Cut& cut) const {
  if (cut.layer >= model_.window_end()) return false;
  if (!IsCut(cut.layer) || scenario_.request.spec.pulls(cut.tensor)) return true;
  if (!model_.pivot()) return false;
  return cut.tensor == InputTensor::kPositions ||
         std::none_of(unsent_cuts_.begin(), unsent_cuts_.end(), [&cut](const Cut& other) {
           return other.layer == cut.layer && other.tensor == InputTensor::kPositions;
         });
}

// Rows that are pulled are those of the answer.
PieceBytes SessionDriver::BytesOf(const Cut& cut) const {
  if (!scenario_.request.spec.pulls(cut.tensor)) {
    return PieceOf(scenario_.sent, cut.layer, cut.tensor, cut.offset, cut.size);
  }
  const testkit::LayerAnswer& answer =
      scenario_.expected.layers.at(static_cast<uint32_t>(cut.layer));
  return {.layer = cut.layer,
          .tensor = cut.tensor,
          .offset = cut.offset,
          .bytes = answer.tensors.at(ProtoTensor(cut.tensor))
                       .substr(static_cast<size_t>(cut.offset), static_cast<size_t>(cut.size))};
}

PieceBytes SessionDriver::Make(const Cut& cut) {
  PieceBytes piece = BytesOf(cut);
  if (random_.Chance(30)) {
    const absl::Span<const std::byte> bytes(reinterpret_cast<const std::byte*>(piece.bytes.data()),
                                            piece.bytes.size());
    piece.xxh3_64 = wire::Checksum({bytes});
  }
  return piece;
}

void SessionDriver::SendMessage() {
  std::vector<PieceBytes> pieces;
  const int64_t count = random_.Between(1, 4);
  for (int64_t i = 0; i < count; ++i) {
    if (!sent_cuts_.empty() && random_.Chance(10)) {  // one that came, once more
      const auto last = static_cast<int64_t>(sent_cuts_.size()) - 1;
      pieces.push_back(Make(sent_cuts_[static_cast<size_t>(random_.Between(0, last))]));
      continue;
    }
    std::vector<size_t> allowed;
    for (size_t at = 0; at < unsent_cuts_.size(); ++at) {
      if (MayBeSent(unsent_cuts_[at])) allowed.push_back(at);
    }
    if (allowed.empty()) break;
    const auto last = static_cast<int64_t>(allowed.size()) - 1;
    const size_t at = allowed[static_cast<size_t>(random_.Between(0, last))];
    pieces.push_back(Make(unsent_cuts_[at]));
    sent_cuts_.push_back(unsent_cuts_[at]);
    unsent_cuts_.erase(unsent_cuts_.begin() + static_cast<ptrdiff_t>(at));
  }
  if (!scenario_.calm && random_.Chance(6)) {
    const int64_t at = random_.Between(0, static_cast<int64_t>(pieces.size()));
    pieces.insert(pieces.begin() + at, BadPiece());
  }
  if (!pieces.empty()) Append(pieces);
}

// A piece that cannot be taken, most of the time.
PieceBytes SessionDriver::BadPiece() {
  const engine::PromptSpec& spec = scenario_.request.spec;
  const auto tensor = static_cast<InputTensor>(random_.Between(0, engine::kInputTensors - 1));
  const int64_t size = spec.InputBytes(tensor);
  PieceBytes piece = {.tensor = tensor, .bytes = "sixteen bytes..."};
  piece.layer = random_.Between(0, spec.geometry.layers - 1);
  if (size > 16) piece.offset = random_.Between(0, size - 16);
  switch (random_.Between(0, 5)) {
    case 0:
      piece.layer = random_.Chance(50) ? spec.geometry.layers : -1;
      break;
    case 1:
      piece.offset = random_.Chance(50) ? size - 15 : -1;
      break;
    case 2:
      piece.bytes.clear();
      break;
    case 3:
      piece.xxh3_64 = 1;
      break;
    default:
      if (sent_cuts_.empty()) break;
      const auto last = static_cast<int64_t>(sent_cuts_.size()) - 1;
      const Cut& cut = sent_cuts_[static_cast<size_t>(random_.Between(0, last))];
      piece = BytesOf(cut);
      if (random_.Chance(50)) {
        piece.bytes.back() = static_cast<char>(piece.bytes.back() ^ 1);  // other bytes
      } else {
        piece.bytes.pop_back();  // an overlap
      }
      break;
  }
  return piece;
}

void SessionDriver::Append(const std::vector<PieceBytes>& pieces) {
  absl::StrAppend(&log_, "append");
  for (const PieceBytes& piece : pieces) {
    absl::StrAppend(&log_, " ", piece.layer, "/", static_cast<int>(piece.tensor), "/", piece.offset,
                    "+", piece.bytes.size());
  }
  absl::StrAppend(&log_, "; ");
  model_.Append(pieces);
  session_->Append(MessageOf(pieces, static_cast<size_t>(random_.Between(1, 5)), &owner_));
}

void SessionDriver::CommitRight() {
  absl::StrAppend(&log_, "commit; ");
  const int64_t layers = scenario_.request.spec.geometry.layers;
  const int64_t bytes = model_.received_bytes();
  model_.Commit(layers, bytes);
  session_->Commit(layers, bytes);
}

void SessionDriver::CommitWrong() {
  const int64_t layers = scenario_.request.spec.geometry.layers + random_.Between(-1, 1);
  const int64_t bytes = model_.received_bytes() + random_.Between(-1, 1);
  absl::StrAppend(&log_, "commit of ", layers, ", ", bytes, "; ");
  model_.Commit(layers, bytes);
  session_->Commit(layers, bytes);
}

void SessionDriver::Sent() {
  const int64_t all = model_.unsent_bytes();
  if (all == 0) return;
  const int64_t bytes = random_.Chance(50) ? all : random_.Between(1, all);
  absl::StrAppend(&log_, "sent ", bytes, " of ", all, "; ");
  probe_->Sent(bytes);
  model_.OutputSent(bytes);
  session_->OutputSent(bytes);
}

void SessionDriver::DoWrong() {
  switch (random_.Between(0, 4)) {
    case 0:
      absl::StrAppend(&log_, "cancel; ");
      model_.Cancel();
      if (random_.Chance(50)) {
        session_->Cancel();
      } else {
        session_.reset();  // the same
      }
      return;
    case 1:
      absl::StrAppend(&log_, "end of input; ");
      model_.EndOfInput();
      session_->EndOfInput();
      return;
    case 2:
      if (!model_.asked() && !model_.committed()) return;
      CommitWrong();
      return;
    default:
      if (!model_.asked() && !model_.committed()) return;
      Append(random_.Chance(50) ? std::vector<PieceBytes>() : std::vector{BadPiece()});
      return;
  }
}

void SessionDriver::OpenGate() {
  if (model_.gate_open()) return;
  absl::StrAppend(&log_, "open gate; ");
  model_.OpenGate();
  faults_->OpenGate(scenario_.request.spec.prompt_tokens);
  Check();
}

void SessionDriver::ExpectFailure(absl::StatusCode code) {
  absl::StrAppend(&log_, "fails as ", absl::StatusCodeToString(code), "; ");
  model_.Fail(code);
  Check();
}

void SessionDriver::Step() {
  const bool wrong = !scenario_.calm && random_.Chance(3);
  if (session_ == nullptr || (model_.ended() && !wrong)) {
    if (!model_.gate_open()) {
      OpenGate();
    } else if (session_ != nullptr) {
      Sent();
    }
  } else if (wrong) {
    DoWrong();
  } else if (scenario_.model.gate_holds && random_.Chance(12)) {
    if (model_.gate_open()) {
      absl::StrAppend(&log_, "close gate; ");
      model_.CloseGate();
      faults_->CloseGate(scenario_.request.spec.prompt_tokens);
    } else {
      OpenGate();
    }
  } else if (random_.Chance(30)) {
    Sent();
  } else if (model_.asked() && !model_.committed()) {
    if (model_.all_came()) {
      CommitRight();
    } else {
      SendMessage();
    }
  } else if (model_.committed() && random_.Chance(20)) {
    absl::StrAppend(&log_, "end of input; ");
    model_.EndOfInput();
    session_->EndOfInput();
  }
  Check();
}

void SessionDriver::Check() {
  SCOPED_TRACE(log_);
  if (model_.in_doubt()) {
    model_.OpenGate();
    faults_->OpenGate(scenario_.request.spec.prompt_tokens);
  }
  const bool came = probe_->WaitFor([&](const Seen& seen) {
    return seen.ready >= model_.ready() && seen.answer.order.size() >= model_.layers().size() &&
           seen.pulls.size() >= model_.pulls().size() &&
           seen.answer.pivot.has_value() >= model_.pivot() &&
           seen.finished.has_value() >= model_.finished() &&
           seen.failed.has_value() >= model_.failed().has_value();
  });
  EXPECT_TRUE(came) << "what the model says does not come";
  if (model_.blocked()) {
    EXPECT_TRUE(faults_->WaitUntilBlocked(scenario_.request.spec.prompt_tokens));
  }
  const Seen seen = probe_->seen();
  EXPECT_EQ(seen.ready, model_.ready());
  EXPECT_EQ(seen.answer.order, model_.layers());
  EXPECT_EQ(seen.pulls.size(), model_.pulls().size());
  CutPulled();
  EXPECT_EQ(seen.answer.pivot.has_value(), model_.pivot());
  EXPECT_EQ(seen.finished.has_value(), model_.finished());
  EXPECT_EQ(seen.failed.has_value(), model_.failed().has_value());
  if (seen.failed.has_value() && model_.failed().has_value()) {
    EXPECT_EQ(seen.failed->code(), *model_.failed()) << *seen.failed;
  }
  EXPECT_TRUE(seen.faults.empty()) << ::testing::PrintToString(seen.faults);
  if (!model_.parked()) {
    EXPECT_TRUE(Eventually([&] { return owner_.expired(); }))
        << "a message that is not parked is held";
  }
  CheckResults(seen);
}

void SessionDriver::CheckResults(const Seen& seen) {
  for (; checked_layers_ < seen.answer.order.size(); ++checked_layers_) {
    const uint32_t layer = seen.answer.order[checked_layers_];
    EXPECT_TRUE(LayerBytes(seen.answer, layer) == LayerBytes(scenario_.expected, layer))
        << "layer " << layer;
  }
  for (const uint32_t layer : model_.pulls()) {
    const auto pull = seen.pulls.find(layer);
    ASSERT_TRUE(pull != seen.pulls.end()) << "layer " << layer << " was not pulled";
    const testkit::LayerAnswer& answer = scenario_.expected.layers.at(layer);
    EXPECT_EQ(pull->second.kept_tokens, answer.kept_tokens);
    EXPECT_EQ(pull->second.positions, testkit::AsInts(answer.tensors.at(v1::TENSOR_POSITIONS)));
    EXPECT_EQ(pull->second.keys, scenario_.request.spec.pulls(InputTensor::kKeys));
  }
  if (seen.answer.pivot.has_value()) {
    testkit::Answer got;
    testkit::Answer want;
    got.pivot = seen.answer.pivot;
    want.pivot = scenario_.expected.pivot;
    EXPECT_TRUE(testkit::ResultBytes(got) == testkit::ResultBytes(want)) << "pivot";
  }
  if (seen.finished.has_value()) {
    EXPECT_EQ(seen.finished->layers, scenario_.request.spec.geometry.layers);
    EXPECT_EQ(seen.finished->input_bytes, model_.received_bytes());
  }
}

}  // namespace structkv::session

#include "service/rpc/shard_agreement.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace structkv::rpc {
namespace {

using Fields = std::vector<std::pair<std::string, std::string>>;

void AddFields(const google::protobuf::Message& message, const std::string& prefix,
               Fields* fields) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  std::vector<const google::protobuf::FieldDescriptor*> set;
  reflection.ListFields(message, &set);
  for (const google::protobuf::FieldDescriptor* field : set) {
    const std::string name = absl::StrCat(prefix, ".", field->name());
    const bool repeated = field->is_repeated();
    const int count = repeated ? reflection.FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      const std::string item = repeated ? absl::StrCat(name, "[", i, "]") : name;
      if (field->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_MESSAGE) {
        // Its presence may say something by itself.
        fields->emplace_back(item, "set");
        AddFields(repeated ? reflection.GetRepeatedMessage(message, field, i)
                           : reflection.GetMessage(message, field),
                  item, fields);
        continue;
      }
      std::string value;
      google::protobuf::TextFormat::PrintFieldValueToString(message, field, repeated ? i : -1,
                                                            &value);
      fields->emplace_back(item, std::move(value));
    }
  }
}

}  // namespace

std::vector<std::pair<std::string, std::string>> AgreedFields(const v1::Open& open,
                                                              const OpenRequest& request) {
  v1::Open common = open;
  common.clear_idempotency_key();
  common.clear_max_response_message_bytes();
  common.clear_transports();
  common.clear_regions();
  common.clear_result_range();
  common.clear_nccl_pair();
  common.mutable_shard_group()->clear_shard_index();
  common.mutable_shard_group()->clear_kv_heads();
  common.mutable_shard_group()->clear_query_heads();
  *common.mutable_method() = EncodeMethod(request.spec.method);
  common.set_statistic(EncodeStatistic(request.spec.statistic));
  common.set_layers_in_flight(static_cast<uint32_t>(request.layers_in_flight));
  if (common.output() == v1::OUTPUT_UNSPECIFIED) common.set_output(v1::OUTPUT_COMPACT);
  common.mutable_geometry()->set_value_dim(static_cast<uint32_t>(request.spec.geometry.value_dim));
  Fields fields;
  AddFields(common, "open", &fields);
  std::sort(fields.begin(), fields.end());
  return fields;
}

}  // namespace structkv::rpc

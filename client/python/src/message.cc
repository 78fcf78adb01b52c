#include "message.h"

#include <nanobind/stl/string.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "error.h"
#include "google/protobuf/descriptor.h"

namespace structkv::python {

namespace nb = nanobind;
using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

namespace {

[[noreturn]] void Refuse(const std::string& name, nb::handle value, const std::string& allowed) {
  const std::string shown = nb::cast<std::string>(nb::repr(value));
  Throw(absl::InvalidArgumentError(absl::StrCat(name, " is ", shown, "; ", allowed)));
}

std::string ClassName(nb::handle object) {
  return nb::cast<std::string>(object.type().attr("__name__"));
}

// A message that is one of several others (Method) has no class of its own.
bool IsUnion(const Descriptor* type) {
  if (type->field_count() == 0 || type->real_oneof_decl_count() != 1) return false;
  return type->oneof_decl(0)->field_count() == type->field_count();
}

// What the names of an enum's values begin with.
std::string Prefix(const EnumDescriptor* type) {
  const std::string& zero = type->value(0)->name();
  return zero.substr(0, zero.size() - std::string("UNSPECIFIED").size());
}

std::string ShortName(const EnumDescriptor* type, int index) {
  return absl::AsciiStrToLower(type->value(index)->name().substr(Prefix(type).size()));
}

template <typename T>
T Integer(nb::handle value, const std::string& name) {
  int64_t number = 0;
  const bool fits = nb::try_cast<int64_t>(nb::borrow(value), number, /*convert=*/false);
  using Limits = std::numeric_limits<T>;
  const auto most =
      static_cast<int64_t>(std::min<uint64_t>(Limits::max(), std::numeric_limits<int64_t>::max()));
  if (!fits || number < static_cast<int64_t>(Limits::min()) || number > most) {
    Refuse(name, value, absl::StrCat("an int from ", Limits::min(), " to ", most, " is expected"));
  }
  return static_cast<T>(number);
}

template <typename T>
T Value(nb::handle value, const std::string& name, const char* expected) {
  T result{};
  if (!nb::try_cast<T>(nb::borrow(value), result)) Refuse(name, value, expected);
  return result;
}

// Sets or, where the field is repeated, adds.
void Put(nb::handle value, const FieldDescriptor* field, const std::string& name,
         Message* message) {
  const Reflection& fields = *message->GetReflection();
  const bool repeated = field->is_repeated();
  const auto put = [&](auto set, auto add, auto converted) {
    (fields.*(repeated ? add : set))(message, field, converted);
  };
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return put(&Reflection::SetUInt32, &Reflection::AddUInt32, Integer<uint32_t>(value, name));
    case FieldDescriptor::CPPTYPE_UINT64:
      return put(&Reflection::SetUInt64, &Reflection::AddUInt64, Integer<uint64_t>(value, name));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return put(&Reflection::SetDouble, &Reflection::AddDouble,
                 Value<double>(value, name, "a float is expected"));
    case FieldDescriptor::CPPTYPE_BOOL:
      return put(&Reflection::SetBool, &Reflection::AddBool,
                 Value<bool>(value, name, "a bool is expected"));
    case FieldDescriptor::CPPTYPE_ENUM:
      return put(&Reflection::SetEnumValue, &Reflection::AddEnumValue,
                 ToEnum(field->enum_type(), value, name));
    case FieldDescriptor::CPPTYPE_STRING: {
      const bool bytes = field->type() == FieldDescriptor::TYPE_BYTES;
      if (!(bytes ? nb::isinstance<nb::bytes>(value) : nb::isinstance<nb::str>(value))) {
        Refuse(name, value, bytes ? "bytes are expected" : "a str is expected");
      }
      std::string text = bytes ? std::string(nb::borrow<nb::bytes>(value).c_str(), nb::len(value))
                               : nb::cast<std::string>(value);
      return put(&Reflection::SetString, &Reflection::AddString, std::move(text));
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToMessage(value, repeated ? fields.AddMessage(message, field)
                                       : fields.MutableMessage(message, field));
    default:
      Refuse(name, value, absl::StrCat("the type ", field->type_name(), " is not supported"));
  }
}

nb::object Get(const Message& message, const FieldDescriptor* field, int index) {
  const Reflection& fields = *message.GetReflection();
  const bool repeated = field->is_repeated();
  const auto get = [&](auto single, auto one_of) {
    return repeated ? (fields.*one_of)(message, field, index) : (fields.*single)(message, field);
  };
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return nb::int_(get(&Reflection::GetUInt32, &Reflection::GetRepeatedUInt32));
    case FieldDescriptor::CPPTYPE_UINT64:
      return nb::int_(get(&Reflection::GetUInt64, &Reflection::GetRepeatedUInt64));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return nb::float_(get(&Reflection::GetDouble, &Reflection::GetRepeatedDouble));
    case FieldDescriptor::CPPTYPE_BOOL:
      return nb::bool_(get(&Reflection::GetBool, &Reflection::GetRepeatedBool));
    case FieldDescriptor::CPPTYPE_ENUM:
      return FromEnum(field->enum_type(),
                      get(&Reflection::GetEnumValue, &Reflection::GetRepeatedEnumValue));
    case FieldDescriptor::CPPTYPE_STRING: {
      const std::string text = get(&Reflection::GetString, &Reflection::GetRepeatedString);
      if (field->type() == FieldDescriptor::TYPE_BYTES) return nb::bytes(text.data(), text.size());
      return nb::str(text.data(), text.size());
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return FromMessage(repeated ? fields.GetRepeatedMessage(message, field, index)
                                  : fields.GetMessage(message, field));
    default:
      return nb::none();
  }
}

}  // namespace

void ToMessage(nb::handle object, Message* message) {
  const Descriptor* type = message->GetDescriptor();
  const std::string given = ClassName(object);
  std::vector<std::string> allowed;
  if (IsUnion(type)) {
    for (int i = 0; i < type->field_count(); ++i) {
      const FieldDescriptor* field = type->field(i);
      if (field->message_type()->name() == given) return Put(object, field, type->name(), message);
      allowed.push_back(field->message_type()->name());
    }
  } else if (type->name() != given) {
    allowed.push_back(type->name());
  }
  if (!allowed.empty()) {
    Refuse(type->name(), object,
           absl::StrCat("an object of the class ", absl::StrJoin(allowed, ", "), " is expected"));
  }
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const nb::object value = nb::getattr(object, field->name().c_str());
    if (value.is_none()) continue;
    const std::string name = absl::StrCat(type->name(), ".", field->name());
    if (!field->is_repeated()) {
      Put(value, field, name, message);
    } else if (nb::hasattr(value, "__iter__") && !nb::isinstance<nb::str>(value)) {
      for (nb::handle element : value) Put(element, field, name, message);
    } else {
      Refuse(name, value, "a sequence is expected");
    }
  }
}

nb::object FromMessage(const Message& message) {
  const Descriptor* type = message.GetDescriptor();
  const Reflection& fields = *message.GetReflection();
  if (IsUnion(type)) {
    const FieldDescriptor* set = fields.GetOneofFieldDescriptor(message, type->oneof_decl(0));
    return set == nullptr ? nb::none() : Get(message, set, 0);
  }
  nb::dict arguments;
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    if (field->has_presence() && !fields.HasField(message, field)) continue;
    nb::object value;
    if (field->is_repeated()) {
      nb::list values;
      for (int k = 0; k < fields.FieldSize(message, field); ++k) {
        values.append(Get(message, field, k));
      }
      value = nb::tuple(values);
    } else {
      value = Get(message, field, 0);
    }
    arguments[nb::str(field->name().c_str())] = value;
  }
  return nb::module_::import_("structkv.messages").attr(type->name().c_str())(**arguments);
}

nb::object FromEnum(const EnumDescriptor* type, int number) {
  const auto* value = type->FindValueByNumber(number);
  if (number == 0) return nb::none();
  if (value == nullptr) return nb::str(absl::StrCat(number).c_str());
  return nb::str(ShortName(type, value->index()).c_str());
}

int ToEnum(const EnumDescriptor* type, nb::handle value, const std::string& name) {
  std::vector<std::string> allowed;
  for (int i = 1; i < type->value_count(); ++i) {
    allowed.push_back(ShortName(type, i));
    if (nb::isinstance<nb::str>(value) && nb::cast<std::string>(value) == allowed.back()) {
      return type->value(i)->number();
    }
  }
  Refuse(name, value, absl::StrCat("one of ", absl::StrJoin(allowed, ", "), " is expected"));
}

}  // namespace structkv::python

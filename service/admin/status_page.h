// The page that shows /statusz.json, with all that it needs within.
#pragma once

#include <string_view>

namespace structkv::admin {

std::string_view StatusPage();  // status_page.html

}  // namespace structkv::admin

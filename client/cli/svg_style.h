// The look that the command's pictures share.
#pragma once

namespace structkv::cli {

// A <style> element: one hue carries the data and one marks the pivot; both hold against either
// ground, light and dark.
const char* SvgStyle();

}  // namespace structkv::cli

#include "client/cli/svg_style.h"

namespace structkv::cli {
namespace {

constexpr char kStyle[] = R"(<style>
svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.ground { fill: #ffffff; }
.title { font-size: 20px; font-weight: 600; fill: #1f2328; }
.subtitle { font-size: 13px; fill: #59636e; }
.head { font-size: 13px; font-weight: 600; fill: #1f2328; }
.label { font-size: 12px; fill: #1f2328; }
.note, .tick { font-size: 11px; fill: #59636e; }
.grid { stroke: #e4e8ec; stroke-width: 1; }
.axis { stroke: #b4bcc4; stroke-width: 1; }
.search { fill: #59636e; fill-opacity: 0.09; }
.line { fill: none; stroke: #2468c8; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: #2468c8; }
.pivot-line { stroke: #d4541a; stroke-width: 1.5; stroke-dasharray: 4 3; }
.pivot-dot { fill: #d4541a; stroke: #ffffff; stroke-width: 1.5; }
.pivot-text { font-size: 11px; font-weight: 600; fill: #b9430f; }
.track { fill: #eef1f4; }
.kept { fill: #2468c8; }
.skeleton { fill: #d4541a; }
.kept-run { fill: none; stroke: #2468c8; }
.skeleton-run { fill: none; stroke: #d4541a; }
.range { stroke: #2468c8; stroke-width: 1.5; }
.cell-text { font-size: 11px; fill: #1f2328; }
.cell-text-on { font-size: 11px; fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; }
  .title, .head, .label { fill: #f0f6fc; }
  .subtitle, .note, .tick { fill: #9aa4af; }
  .grid { stroke: #262c34; }
  .axis { stroke: #4a525c; }
  .search { fill: #9aa4af; fill-opacity: 0.12; }
  .line, .range, .kept-run { stroke: #5b9bf0; }
  .dot, .kept { fill: #5b9bf0; }
  .pivot-line, .skeleton-run { stroke: #f0823f; }
  .pivot-dot { fill: #f0823f; stroke: #0d1117; }
  .pivot-text { fill: #f79a60; }
  .track { fill: #1a2028; }
  .skeleton { fill: #f0823f; }
  .cell-text { fill: #f0f6fc; }
  .cell-text-on { fill: #0d1117; }
}
</style>
)";

}  // namespace

const char* SvgStyle() { return kStyle; }

}  // namespace structkv::cli

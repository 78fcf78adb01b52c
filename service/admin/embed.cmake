# Writes the file PAGE as a C++ string to OUT.
file(READ ${PAGE} page)
if(page MATCHES "\\)page\"")
  message(FATAL_ERROR "${PAGE} holds the text that ends the string")
endif()
file(WRITE ${OUT}
  "#include \"service/admin/status_page.h\"\n\n"
  "namespace structkv::admin {\n\n"
  "std::string_view StatusPage() { return R\"page(${page})page\"; }\n\n"
  "}  // namespace structkv::admin\n")

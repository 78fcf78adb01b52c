#include "service/rpc/connection_handover.h"

#include "service/rpc/stream_set.h"

namespace structkv::rpc {

ConnectionHandover::~ConnectionHandover() {
  std::vector<std::thread> threads;
  {
    absl::MutexLock lock(&mutex_);
    over_ = true;
    threads.swap(threads_);
  }
  for (std::thread& thread : threads) thread.join();
}

void ConnectionHandover::Give(Acceptor* acceptor, int fd) {
  absl::MutexLock lock(&mutex_);
  waiting_.push_back({acceptor, fd, SteadyNanos()});
  AddThreadIfDue();
}

void ConnectionHandover::Look() {
  absl::MutexLock lock(&mutex_);
  AddThreadIfDue();
}

void ConnectionHandover::AddThreadIfDue() {
  if (idle_ >= waiting_.size()) return;
  const int64_t now = SteadyNanos();
  const int64_t patience = absl::ToInt64Nanoseconds(kPatience);
  if (threads_.size() >= kThreads &&
      (now - waiting_.front().since < patience || now - added_ < patience)) {
    return;
  }
  added_ = now;
  ++idle_;
  threads_.emplace_back([this] { Run(); });
}

void ConnectionHandover::Run() {
  const auto due = [this]()
                       ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return over_ || !waiting_.empty(); };
  while (true) {
    Connection connection = {};
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&due));
      if (waiting_.empty()) return;
      connection = waiting_.front();
      waiting_.pop_front();
      --idle_;
    }
    Acceptor::NewConnectionParameters parameters;
    parameters.fd = connection.fd;
    connection.acceptor->HandleNewConnection(&parameters);
    absl::MutexLock lock(&mutex_);
    ++idle_;
  }
}

}  // namespace structkv::rpc
